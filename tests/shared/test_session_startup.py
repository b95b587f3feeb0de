from __future__ import annotations

from pathlib import Path

import pytest

from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.errors import ConfigError, NotExact
from trifold.shared.runtime.shard import Shard
from trifold.shared.session.ports import listening
from trifold.shared.session.startup import load_tier
from trifold.shared.settings import CloudSettings


@pytest.fixture
def inexact_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose self-test fails."""
    load = Shard.load

    def fail(folder: TierFolder, *, progress: Progress) -> Shard:
        shard = load(folder, progress=progress)
        shard.exact = False
        return shard

    monkeypatch.setattr(Shard, "load", fail)


def test_a_tier_is_loaded_and_tells_how_far_it_is(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, shard = load_tier(CloudSettings(bundle=bundle, listen="127.0.0.1:0"), "cloud", Shard.load)
    assert shard.tier == "cloud"
    assert manifest.serving_digest
    said = capsys.readouterr()
    assert said.out == ""
    assert "loading the cloud shard" in said.err
    assert f"exact, {shard.fingerprint}" in said.err


@pytest.mark.usefixtures("inexact_engine")
def test_an_engine_that_fails_the_self_test_does_not_serve_unless_that_is_allowed(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotExact, match="--inexact"):
        load_tier(CloudSettings(bundle=bundle, listen="127.0.0.1:0"), "cloud", Shard.load)
    _, shard = load_tier(
        CloudSettings(bundle=bundle, listen="127.0.0.1:0", inexact=True), "cloud", Shard.load
    )
    assert not shard.exact
    assert "NOT EXACT" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening("127.0.0.1:0") as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen at {taken}: is another"):
            load_tier(CloudSettings(bundle=bundle, listen=taken), "cloud", Shard.load)
        with pytest.raises(ConfigError, match=taken):
            load_tier(CloudSettings(bundle=bundle, listen="127.0.0.1:0", metrics=taken), "cloud", Shard.load)
    assert capsys.readouterr().err == ""
