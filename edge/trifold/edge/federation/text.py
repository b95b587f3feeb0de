"""A site's own text, as token ids; it stays at the site."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trifold.shared.errors import ConfigError, InvalidRequest

Tokens = NDArray[np.int64]

log = logging.getLogger(__name__)

_HELD_OUT = 0.1
"""Share of each file, its end, that is never trained on; where there is no folder of held-out text."""


class SiteText:
    """Token ids (n,) to train on and others, held out, to evaluate with."""

    def __init__(self, training: Tokens, heldout: Tokens) -> None:
        self.training = training
        self.heldout = heldout

    @classmethod
    def read(cls, folder: Path, tokenizer: Tokenizer) -> Self:
        """The text files of `folder/train` and `folder/heldout`, or else all of `folder`.

        Files that are hidden, or not UTF-8, are left out. Raises ConfigError where there is no text.
        """
        if (folder / "train").is_dir() and (folder / "heldout").is_dir():
            training = [_encode(text, tokenizer) for text in _texts(folder / "train")]
            heldout = [_encode(text, tokenizer) for text in _texts(folder / "heldout")]
        else:
            files = [_encode(text, tokenizer) for text in _texts(folder)]
            ends = [round(len(tokens) * (1 - _HELD_OUT)) for tokens in files]
            training = [tokens[:end] for tokens, end in zip(files, ends, strict=True)]
            heldout = [tokens[end:] for tokens, end in zip(files, ends, strict=True)]
        if not training or not heldout:
            raise ConfigError(
                f"{folder}: no text in UTF-8 here; the text of a site is a folder of such files"
            )
        return cls(np.concatenate(training), np.concatenate(heldout))

    def batches(self, sequences: int, length: int, *, seed: int, start: int) -> Iterator[Tokens]:
        """Batches (sequences, length + 1) without end, from the one numbered `start` on.

        An epoch takes each piece of the text once, in an order drawn from the seed; batch `start` is the same
        wherever one begins. Raises InvalidRequest when the text has not one sequence.
        """
        pieces = _pieces(self.training, length)
        if not len(pieces):
            raise InvalidRequest(f"the site's text to train on is shorter than a sequence of {length} tokens")
        at = start * sequences
        while True:
            yield np.stack([pieces[_drawn(len(pieces), seed, at + index)] for index in range(sequences)])
            at += sequences

    def evaluation(self, sequences: int, length: int, batches: int) -> Iterator[Tokens]:
        """The first batches (sequences, length + 1) of the held-out text, always the same.

        Raises InvalidRequest when the held-out text has not one sequence.
        """
        pieces = _pieces(self.heldout, length)[: sequences * batches]
        if not len(pieces):
            raise InvalidRequest(
                f"the site's held-out text is shorter than a sequence of {length} tokens: give it more, "
                "or a run with local.evaluate=0"
            )
        for start in range(0, len(pieces), sequences):
            yield pieces[start : start + sequences]


def _texts(folder: Path) -> Iterator[str]:
    """The text of all files, in the order of their paths; what lies in a hidden folder (.git) is no text."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                log.warning("%s is not UTF-8: it is left out", path)
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _encode(text: str, tokenizer: Tokenizer) -> Tokens:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)


def _pieces(tokens: Tokens, length: int) -> Tokens:
    """(n, length + 1): each piece begins with the last token of the one before, so each is predicted once."""
    count = max(0, (len(tokens) - 1) // length)
    starts = np.arange(count)[:, None] * length
    pieces: Tokens = tokens[starts + np.arange(length + 1)]
    return pieces


def _drawn(count: int, seed: int, at: int) -> int:
    """The piece at place `at` of the endless order of epochs."""
    epoch, place = divmod(at, count)
    return int(_order(count, seed, epoch)[place])


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
