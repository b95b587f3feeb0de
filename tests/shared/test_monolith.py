"""The monolith: generation, and what it applies at the cuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trifold.shared.errors import PromptTooLong
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.monolith import Monolith, row_digest
from trifold.shared.runtime.sampling import Sampling, pick

PROMPT = [5, 17, 300, 42, 42, 7, 111, 0, 9, 256, 33]


@pytest.fixture(scope="module")
def monolith(bundle: Path) -> Monolith:
    return Monolith.load(bundle, threads=1)


@pytest.fixture(scope="module")
def attending(attending_bundle: Path) -> Monolith:
    return Monolith.load(attending_bundle, threads=1)


def test_generation_is_prompt_then_token_after_token(monolith: Monolith) -> None:
    sampling = Sampling(temperature=0.9, seed=7)
    tokens = list(monolith.generate(PROMPT, sampling, 20, eos=()))
    ids = PROMPT + [token.id for token in tokens]
    assert [token.position for token in tokens] == list(range(len(PROMPT), len(PROMPT) + 20))
    session = monolith.session(64)
    logits = session.feed(np.array(ids), 0)
    digests = [row_digest(row) for row in session.rows]
    for token in tokens:
        assert token.id == pick(logits[token.position - 1], sampling, token.position)
        assert token.row_digest == digests[token.position - 1]


@pytest.mark.parametrize("chunk", [1, 2, 3, 10, 11])
def test_the_chunks_of_a_prompt_change_no_token_and_no_row(
    monolith: Monolith, attending: Monolith, chunk: int
) -> None:
    for model in (monolith, attending):
        whole = list(model.generate(PROMPT, Sampling(), 8, eos=()))
        assert list(model.generate(PROMPT, Sampling(), 8, eos=(), chunk=chunk)) == whole


def test_generation_ends_with_the_first_token_of_eos(monolith: Monolith) -> None:
    ids = [token.id for token in monolith.generate(PROMPT, Sampling(), 12, eos=())]
    ended = [token.id for token in monolith.generate(PROMPT, Sampling(), 12, eos=ids[4:5])]
    assert ended == ids[: ids.index(ids[4]) + 1]


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same(monolith: Monolith) -> None:
    def ids(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return [token.id for token in monolith.generate(PROMPT, sampling, 12, eos=())]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_the_device_gets_rows_that_went_through_the_codec(monolith: Monolith) -> None:
    session = monolith.session(32)
    session.feed(np.array(PROMPT), 0)
    codec = RowCodec("int8", monolith.edge.hidden)
    assert np.array_equal(codec.decode(codec.encode(session.rows, 0), len(PROMPT), 0), session.rows)
    levels = [len(np.unique(row)) for row in session.rows[4:]]
    assert max(levels) <= 255


def test_logits_of_later_positions_are_a_slice_of_all(monolith: Monolith, attending: Monolith) -> None:
    for model in (monolith, attending):
        everything = model.session(32).feed(np.array(PROMPT), 0)
        for start in range(len(PROMPT) + 1):
            session = model.session(32)
            assert np.array_equal(session.feed(np.array(PROMPT), 0, start), everything[start:])
            assert len(session.rows) == len(PROMPT) - start


def test_feeding_an_earlier_position_again_forgets_what_came_after(monolith: Monolith) -> None:
    fresh = monolith.session(32).feed(np.array(PROMPT), 0)
    session = monolith.session(32)
    session.feed(np.array([*PROMPT[:4], 1, 2, 3, 4, 5]), 0)
    assert np.array_equal(session.feed(np.array(PROMPT[4:]), 4), fresh[4:])


def test_more_tokens_than_the_model_has_positions_are_refused(monolith: Monolith) -> None:
    with pytest.raises(PromptTooLong, match="250 new tokens in 256 positions"):
        next(monolith.generate(PROMPT, Sampling(), 250))
