from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from trifold.device.service.keys import ApiKeys, Caller, add_key
from trifold.device.service.rates import Rates
from trifold.shared.errors import ConfigError, InvalidRequest, Overloaded, Unauthenticated


def test_a_key_is_known_by_its_hash_and_is_nowhere_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in path.read_text()
    keys = ApiKeys(path, requests_per_minute=5)
    assert keys.caller(f"Bearer {key}") == Caller("alice", 5, 0)
    assert keys.caller(f"bearer {key}").name == "alice"
    for wrong in (None, "", key, f"Basic {key}", "Bearer ", f"Bearer {key}x"):
        with pytest.raises(Unauthenticated):
            keys.caller(wrong)


def test_a_change_of_the_file_holds_at_once_and_a_slip_locks_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    alice = add_key(path, "alice")
    keys = ApiKeys(path)
    bob = add_key(path, "bob")
    path.write_text(path.read_text() + "requests_per_minute = 3\ntokens_per_minute = 4\n")
    assert keys.caller(f"Bearer {bob}") == Caller("bob", 3, 4)
    path.write_text(path.read_text() + "sha256 = ")
    assert keys.caller(f"Bearer {alice}").name == "alice"
    path.write_text(path.read_text().partition("[bob]")[0])
    os.utime(path, (1, 1))
    with pytest.raises(Unauthenticated):
        keys.caller(f"Bearer {bob}")


def test_without_a_file_everybody_is_the_same_caller() -> None:
    assert ApiKeys(None, tokens_per_minute=7).caller(None) == Caller("", 0, 7)


@pytest.mark.parametrize("content", ["[a]\nsha256 = 'x'", "[a]\nkey = 'x'", "a = 3", "=", None])
def test_a_file_of_keys_that_cannot_be_used_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"the keys .*keys.toml"):
        ApiKeys(path)


def test_a_name_is_used_once_and_is_one_word(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "alice")
    for name in ("alice", "a b", "", "a]\n[b"):
        with pytest.raises(InvalidRequest):
            add_key(tmp_path / "keys", name)


class Clock:
    """A minute passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_come_back_over_a_minute_one_by_one() -> None:
    clock = Clock()
    rates, alice = Rates(clock), Caller("alice", 3, 0)
    for _ in range(3):
        with rates.admitted(alice, prompt=1, answer=1):
            pass
    with pytest.raises(Overloaded) as refused, rates.admitted(alice, prompt=1, answer=1):
        pass
    assert refused.value.retry_after == pytest.approx(20.0)
    with rates.admitted(Caller("bob", 3, 0), prompt=1, answer=1):
        pass
    clock.now += 20.0
    with rates.admitted(alice, prompt=1, answer=1):
        pass
    with pytest.raises(Overloaded), rates.admitted(alice, prompt=1, answer=1):
        pass


def test_tokens_that_were_not_used_are_given_back() -> None:
    clock = Clock()
    rates, alice = Rates(clock), Caller("alice", 0, 100)
    with rates.admitted(alice, prompt=10, answer=80) as bill:
        bill.tokens += 30
        with pytest.raises(Overloaded), rates.admitted(alice, prompt=10, answer=1):
            pass
    with rates.admitted(alice, prompt=10, answer=50):
        pass
    with pytest.raises(Overloaded) as refused, rates.admitted(alice, prompt=10, answer=50):
        pass
    assert refused.value.retry_after == pytest.approx((50 + 60 - 100) * 60 / 100)
    with pytest.raises(InvalidRequest, match="100 a minute"), rates.admitted(alice, prompt=1, answer=100):
        pass
