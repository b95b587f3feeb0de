"""Profiles: the shapes that an engine is built for, and what each of its batches is padded to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trifold.shared.errors import ConfigError

Shape = tuple[int, ...]

FEWEST_SESSIONS: Final = 4
"""As many as the self-test has."""

_SLOTS: Final = 64
"""16 values of 2 bytes, the least that a position takes of a cache, 8 times over TensorRT's 256 bytes."""


@dataclass(frozen=True)
class Limits:
    """What an engine has memory for: sessions at a time, positions of each, and rows of a prompt at once."""

    sessions: int = 16
    positions: int = 4096
    rows: int = 512

    def __post_init__(self) -> None:
        sound = (
            FEWEST_SESSIONS <= self.sessions <= 1024
            and self.positions >= 32
            and 1 <= self.rows <= self.positions
        )
        if not sound:
            raise ConfigError(
                f"TensorRT: {self.sessions} sessions of {self.positions} positions, {self.rows} rows each: "
                f"sessions are {FEWEST_SESSIONS} to 1024, positions at least 32, rows no more than those"
            )

    def within(self, max_positions: int) -> Limits:
        """For a model that has so many positions at most."""
        positions = min(self.positions, max_positions)
        return Limits(self.sessions, positions, min(self.rows, positions))

    def fitting(self, memory: int, session_bytes: int) -> Limits:
        """With no more sessions than so much memory has room for. Raises ConfigError."""
        room = memory // session_bytes
        if room < FEWEST_SESSIONS:
            raise ConfigError(
                f"TensorRT: {memory >> 20} MiB of KV are room for {room} sessions of {self.positions} "
                f"positions, {-(-session_bytes >> 20)} MiB each; the engine needs {FEWEST_SESSIONS}"
            )
        return Limits(min(self.sessions, room), self.positions, self.rows)

    @property
    def slots(self) -> int:
        """Of a cache: sessions that sit out a batch of others write into the one behind their last.

        A multiple, so that each session's part of a cache begins where TensorRT lets a tensor begin.
        """
        return -(-(self.positions + 1) // _SLOTS) * _SLOTS


@dataclass(frozen=True)
class Profile:
    """Least, typical and most sessions, and rows of each."""

    sessions: tuple[int, int, int]
    rows: tuple[int, int, int]

    def shapes(self, declared: Sequence[int]) -> tuple[Shape, Shape, Shape]:
        """Least, typical and most of an input declared with -1 for sessions (axis 0) and rows (axis 1)."""
        least, typical, most = (
            shape_of(declared, sessions, rows)
            for sessions, rows in zip(self.sessions, self.rows, strict=True)
        )
        return least, typical, most


DECODE: Final = 0
PROMPT: Final = 1


def profiles(limits: Limits) -> tuple[Profile, Profile]:
    """DECODE: a row of each of some sessions. PROMPT: rows of one."""
    typical = sizes(limits)[len(sizes(limits)) // 2]
    return (
        Profile((1, typical, limits.sessions), (1, 1, 1)),
        Profile((1, 1, 1), (1, max(1, limits.rows // 2), limits.rows)),
    )


def shape_of(declared: Sequence[int], sessions: int, rows: int) -> Shape:
    """A declared shape with its -1 filled in."""
    return tuple(size if size >= 0 else (sessions, rows)[axis] for axis, size in enumerate(declared))


def sizes(limits: Limits) -> list[int]:
    """How many sessions a decoding batch may be of: each of them has a CUDA graph."""
    powers = [1 << power for power in range(limits.sessions.bit_length())]
    return [*(power for power in powers if power < limits.sessions), limits.sessions]


def padded(count: int, limits: Limits) -> int:
    """The least of sizes() that `count` sessions fit in."""
    return next(size for size in sizes(limits) if size >= count)
