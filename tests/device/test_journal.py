from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trifold.device.client.journal import Journal, Request
from trifold.shared.errors import DamagedFile, InvalidRequest
from trifold.shared.runtime.sampling import Sampling

REQUEST = Request(
    session="00112233445566778899aabbccddeeff",
    serving_digest="ab" * 32,
    prompt=(5, 6, 7),
    sampling=Sampling(temperature=0.7, top_k=4, top_p=0.9, seed=2**63),
    max_tokens=9,
    stop=("\n\n", "ünd"),
    eos=(0,),
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The journal of a process that ended after three tokens in its second epoch."""
    path = tmp_path / "journal"
    journal = Journal(REQUEST, path)
    journal.raise_epoch()
    journal.note_fingerprints({"edge": "a", "device": "b"})
    journal.commit(11)
    journal.raise_epoch()
    journal.commit(12)
    journal.commit(13)
    journal.close()
    return path


def test_what_was_written_is_what_is_read(written: Path) -> None:
    journal = Journal.open(written)
    assert journal.request == REQUEST
    assert journal.ids == [5, 6, 7, 11, 12, 13]
    assert journal.tokens == [11, 12, 13]
    assert journal.epoch == 2
    assert journal.fingerprints == {"edge": "a", "device": "b"}
    journal.close()


def test_a_resumed_journal_goes_on_in_the_same_file(written: Path) -> None:
    first = Journal.open(written)
    assert first.raise_epoch() == 3
    first.commit(14)
    first.close()
    second = Journal.open(written)
    assert (second.tokens, second.epoch) == ([11, 12, 13, 14], 3)
    second.close()


def test_every_line_is_in_the_file_before_the_call_returns(tmp_path: Path) -> None:
    journal = Journal(REQUEST, tmp_path / "journal")
    for token in range(3):
        journal.commit(token)
        assert json.loads((tmp_path / "journal").read_bytes().splitlines()[-1]) == {"token": token}
    journal.close()


def test_the_file_is_for_its_owner_alone_since_it_holds_the_session(written: Path) -> None:
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert REQUEST.session not in repr(REQUEST)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(cut=st.integers(1, 400), rubbish=st.binary(max_size=20).filter(lambda data: b"\n" not in data))
def test_a_last_line_cut_short_anywhere_costs_that_line_only(written: Path, cut: int, rubbish: bytes) -> None:
    whole = written.read_bytes()
    header = whole.index(b"\n") + 1
    at = max(header, len(whole) - cut)
    torn = written.with_name("torn")
    torn.write_bytes(whole[:at] + rubbish)
    kept = whole[:at][: whole[:at].rindex(b"\n") + 1]
    journal = Journal.open(torn)
    assert torn.read_bytes() == kept
    assert journal.tokens == [11, 12, 13][: len(journal.tokens)]
    # The line that was lost may have been an epoch that a tier knows: it must not be used again.
    assert journal.raise_epoch() > kept.count(b"epoch") + (at > len(kept))
    journal.close()
    Journal.open(torn).close()


def test_damage_in_the_middle_is_refused_by_line(written: Path) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    for bad in (b"\n", b"{\n", b'{"token":-1}\n', b'{"tokens":3}\n', b'{"token":"3"\n', b"\xff\n", b"[]\n"):
        written.write_bytes(b"".join([*lines[:3], bad, *lines[4:]]))
        with pytest.raises(DamagedFile, match="line 4"):
            Journal.open(written)


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"prompt": []}, {"session": "ab"}, {"max_tokens": 0}, {"x": 1}]
)
def test_a_damaged_request_is_refused_by_line(written: Path, change: dict[str, object]) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    lines[0] = json.dumps(json.loads(lines[0]) | change).encode() + b"\n"
    written.write_bytes(b"".join(lines))
    with pytest.raises(DamagedFile, match="line 1"):
        Journal.open(written)


def test_sampling_parameters_out_of_range_in_a_journal_are_damage_too(written: Path) -> None:
    written.write_bytes(written.read_bytes().replace(b'"top_p":0.9', b'"top_p":9.9'))
    with pytest.raises(DamagedFile, match="line 1"):
        Journal.open(written)


@pytest.mark.parametrize("content", [b"", b'{"format":1'])
def test_a_journal_without_a_request_says_that_nothing_had_begun(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="start it anew"):
        Journal.open(path)


@pytest.mark.parametrize("content", [b"Dear diary", b"Dear\ndiary\n", b'{"token":1}\n', b"\x00\xff\n"])
def test_a_file_that_is_no_journal_is_called_so_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"notes.txt is not a journal of Trifold"):
        Journal.open(path)
    assert path.read_bytes() == content


def test_a_journal_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match="nowhere"):
        Journal.open(tmp_path / "nowhere")


def test_an_existing_file_is_never_overwritten(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(InvalidRequest, match="exists"):
        Journal(REQUEST, written)
    assert written.read_bytes() == before


def test_a_second_resumer_is_refused_even_in_another_process(written: Path) -> None:
    journal = Journal.open(written)
    with pytest.raises(InvalidRequest, match="in use"):
        Journal.open(written)
    resume = "import sys; from pathlib import Path; from trifold.device.client.journal import Journal; "
    code = resume + "Journal.open(Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, written], capture_output=True, text=True, check=False)
    assert "in use" in other.stderr
    journal.close()
    Journal.open(written).close()


def test_a_full_disk_is_an_error_before_the_token_counts() -> None:
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("this system has no /dev/full")
    journal = Journal(REQUEST)
    journal._path, journal._file = path, os.fdopen(os.open(path, os.O_WRONLY), "wb", buffering=0)
    with pytest.raises(DamagedFile, match="No space left"):
        journal.commit(1)
    assert journal.tokens == []
    journal.close()


def test_a_tier_whose_fingerprint_changed_is_named() -> None:
    journal = Journal(REQUEST)
    assert journal.note_fingerprints({"edge": "a", "cloud": "b"}) == ()
    assert journal.note_fingerprints({"edge": "a", "cloud": "c"}) == ("cloud",)
    assert journal.note_fingerprints({"edge": "a", "cloud": "c"}) == ()
