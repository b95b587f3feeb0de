from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from trifold.edge.federation.text import SiteText
from trifold.shared.errors import ConfigError, InvalidRequest


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([], BpeTrainer(vocab_size=256, initial_alphabet=ByteLevel.alphabet()))
    return tokenizer


def numbers(count: int) -> SiteText:
    return SiteText(np.arange(count), np.arange(1000, 1000 + count))


def test_the_end_of_each_file_is_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("x" * 90 + "y" * 10)
    (tmp_path / "b" / "c.md").write_text("v" * 45 + "w" * 5)
    text = SiteText.read(tmp_path, tokenizer)
    assert tokenizer.decode(text.training.tolist()) == "x" * 90 + "v" * 45
    assert tokenizer.decode(text.heldout.tolist()) == "y" * 10 + "w" * 5


def test_folders_of_training_and_held_out_text_are_taken_as_they_are(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for name, content in (("train", "abc"), ("heldout", "xyz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(content)
    text = SiteText.read(tmp_path, tokenizer)
    assert tokenizer.decode(text.training.tolist()) == "abc"
    assert tokenizer.decode(text.heldout.tolist()) == "xyz"


def test_files_that_are_no_text_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        SiteText.read(tmp_path, tokenizer)
    (tmp_path / "words.txt").write_text("w" * 100)
    assert len(SiteText.read(tmp_path, tokenizer).training) == 90


def test_what_is_hidden_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / ".texts"
    for name in ("words.txt", ".draft", ".git/config", "sub/.cache/page"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("w" * 100)
    text = SiteText.read(folder, tokenizer)
    assert len(text.training) + len(text.heldout) == 100


def test_an_epoch_has_every_piece_once_and_every_token_is_predicted_once() -> None:
    batches = list(islice(numbers(101).batches(5, 10, seed=1, start=0), 2))
    assert [batch.shape for batch in batches] == [(5, 11), (5, 11)]
    predicted = np.concatenate([batch[:, 1:].reshape(-1) for batch in batches])
    assert sorted(predicted.tolist()) == list(range(1, 101))


def test_a_batch_is_the_same_wherever_one_begins() -> None:
    text = numbers(101)
    whole = list(islice(text.batches(3, 10, seed=1, start=0), 12))
    later = list(islice(text.batches(3, 10, seed=1, start=7), 5))
    assert all(np.array_equal(one, other) for one, other in zip(whole[7:], later, strict=True))
    assert not np.array_equal(whole[0], next(text.batches(3, 10, seed=2, start=0)))


def test_a_text_shorter_than_a_sequence_is_refused_without_saying_how_long_it_is() -> None:
    with pytest.raises(InvalidRequest, match=r"^the site's text to train on is shorter than a .* of 10 t"):
        next(numbers(8).batches(1, 10, seed=0, start=0))
    with pytest.raises(InvalidRequest, match=r"held-out text is shorter than .* 10 .*local\.evaluate=0"):
        next(numbers(8).evaluation(1, 10, 1))


def test_evaluation_takes_the_same_held_out_batches_every_time() -> None:
    once, again = (list(numbers(101).evaluation(4, 10, 2)) for _ in range(2))
    assert [batch.shape for batch in once] == [(4, 11), (4, 11)]
    assert all(np.array_equal(one, other) for one, other in zip(once, again, strict=True))
    assert once[0][0].tolist() == list(range(1000, 1011))
