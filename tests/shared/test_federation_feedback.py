from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trifold.shared import durable
from trifold.shared.errors import DamagedFile, InvalidRequest
from trifold.shared.federation.feedback import ErrorFeedback, Proposal
from trifold.shared.federation.packing import Arrays, Kind, shapes_of, unpack

NAME = "m.q_proj.lora_B"


def update(seed: int) -> Arrays:
    return {NAME: np.random.default_rng(seed).standard_normal((40, 8)).astype(np.float32)}


def feedback(folder: Path) -> ErrorFeedback:
    return ErrorFeedback(folder, "run", "clinic")


def arrived(proposal: Proposal, kind: Kind = "int8") -> Arrays:
    return unpack(proposal.data, shapes_of(update(0)), kind)


@pytest.mark.parametrize("kind", ["int8", "int8-2:4"])
def test_what_packing_lost_arrives_later(tmp_path: Path, kind: Kind) -> None:
    sent = np.zeros((40, 8), np.float64)
    wanted = np.zeros((40, 8), np.float64)
    lost = np.zeros((40, 8), np.float32)
    for number in range(1, 9):
        site = feedback(tmp_path)
        site.settle(number - 1)
        proposal = site.propose(number, "base", update(number), kind, {})
        sent += arrived(proposal, kind)[NAME]
        wanted += update(number)[NAME]
        lost = proposal.residual[NAME]
    assert np.allclose(sent + lost, wanted, atol=1e-4)
    # Without feedback the errors of eight rounds add up; with it only the last one's is missing.
    assert lost.any()


def test_the_residual_advances_only_when_the_server_has_acknowledged(tmp_path: Path) -> None:
    first = feedback(tmp_path).propose(1, "base", update(1), "int8", {})
    without = feedback(tmp_path)
    without.settle(0)
    again = without.propose(2, "base", update(2), "int8", {})
    fresh = ErrorFeedback(tmp_path / "other", "run", "clinic").propose(2, "base", update(2), "int8", {})
    assert again.data == fresh.data

    taken = ErrorFeedback(tmp_path / "taken", "run", "clinic")
    taken.propose(1, "base", update(1), "int8", {})
    taken.settle(1)
    second = taken.propose(2, "base", update(2), "int8", {})
    both = {NAME: update(2)[NAME] + first.residual[NAME]}
    assert second.data == ErrorFeedback(tmp_path / "b", "r", "s").propose(2, "", both, "int8", {}).data


def test_a_round_that_is_asked_again_gets_the_same_bytes(tmp_path: Path) -> None:
    told = {"loss": 2.5, "rows_up": 7}
    proposal = feedback(tmp_path).propose(3, "base", update(3), "int8", told)
    kept = feedback(tmp_path).proposed(3, "base")
    assert kept is not None
    assert (kept.data, kept.report) == (proposal.data, told)
    assert feedback(tmp_path).proposed(3, "other factors") is None
    assert feedback(tmp_path).proposed(4, "base") is None


def test_settling_twice_is_settling_once(tmp_path: Path) -> None:
    site = feedback(tmp_path)
    site.propose(1, "base", update(1), "int8", {})
    site.settle(1)
    site.settle(1)
    second = site.propose(2, "base", update(2), "int8", {})
    feedback(tmp_path).settle(1)
    kept = feedback(tmp_path).proposed(2, "base")
    assert kept is not None
    assert kept.data == second.data


def test_a_server_that_went_back_does_not_get_residuals_of_what_it_lost(tmp_path: Path) -> None:
    site = feedback(tmp_path)
    site.propose(5, "base", update(5), "int8", {})
    site.settle(5)
    site.settle(2)
    fresh = ErrorFeedback(tmp_path / "fresh", "run", "clinic")
    again = site.propose(3, "base", update(3), "int8", {})
    assert again.data == fresh.propose(3, "base", update(3), "int8", {}).data


def chained(folder: Path, *rounds: tuple[int, int]) -> list[bytes]:
    """What a site sends, asked for rounds each after those that the server had taken."""
    sent = []
    for number, acknowledged in rounds:
        site = feedback(folder)
        site.settle(acknowledged)
        sent.append(site.propose(number, "base", update(number), "int8", {}).data)
    return sent


def test_a_round_that_comes_late_takes_nothing_from_newer_ones(tmp_path: Path) -> None:
    expected = chained(tmp_path / "in-order", (1, 0), (2, 1), (4, 2), (5, 4), (6, 5))
    late = chained(tmp_path / "late", (1, 0), (2, 1), (4, 2), (3, 1), (5, 4), (3, 2), (6, 5))
    assert [late[index] for index in (0, 1, 2, 4, 6)] == expected


def test_a_server_that_went_back_goes_on_as_the_first_time(tmp_path: Path) -> None:
    rounds = [(number, number - 1) for number in range(1, 7)]
    straight = chained(tmp_path / "straight", *rounds)
    assert chained(tmp_path / "back", *rounds[:5], *rounds[3:])[5:] == straight[3:]


def test_a_handful_of_proposals_is_kept_whatever_becomes_of_them(tmp_path: Path) -> None:
    chained(tmp_path, (1, 0), *((number, 1) for number in range(2, 20)))
    kept = {int(path.stem) for path in (tmp_path / "run" / "clinic").iterdir()}
    assert kept == {1, 16, 17, 18, 19}
    chained(tmp_path, (20, 19))
    kept = {int(path.stem) for path in (tmp_path / "run" / "clinic").iterdir()}
    assert kept == {17, 18, 19, 20}


def test_runs_and_sites_keep_apart(tmp_path: Path) -> None:
    one = ErrorFeedback(tmp_path, "run", "one")
    one.propose(1, "base", update(1), "int8", {})
    assert ErrorFeedback(tmp_path, "run", "two").proposed(1, "base") is None
    assert ErrorFeedback(tmp_path, "other", "one").proposed(1, "base") is None


def test_a_diverged_update_leaves_what_was_pending(tmp_path: Path) -> None:
    site = feedback(tmp_path)
    site.propose(1, "base", update(1), "int8", {})
    bad = update(2)
    bad[NAME][0, 0] = np.nan
    with pytest.raises(InvalidRequest, match="not finite"):
        site.propose(2, "base", bad, "int8", {})
    assert site.proposed(1, "base") is not None


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = feedback(tmp_path)
    site.propose(1, "base", update(1), "int8", {})

    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "move", crash)
    with pytest.raises(KeyboardInterrupt):
        site.propose(2, "base", update(2), "int8", {})
    monkeypatch.undo()
    assert site.proposed(1, "base") is not None
    assert site.proposed(2, "base") is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    site = feedback(tmp_path)
    site.propose(1, "base", update(1), "int8", {})
    path = tmp_path / "run" / "clinic" / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DamagedFile, match=r"1\.safetensors.*delete it"):
        site.proposed(1, "base")
