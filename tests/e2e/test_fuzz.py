"""Mutated frames at every RPC, guided by the lines that they reach: refused at once, and nobody is harmed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from tests.fuzzing import targets
from tests.fuzzing.fuzzer import Fuzzer, Target
from tests.shared.sites import train_bundle

REFUSED = 150


@pytest.mark.parametrize("service", ["edge", "cloud", "generation", "authority", "training"])
async def test_whatever_is_said_to_a_service_is_answered_and_its_neighbour_gets_the_same_bits(
    service: str, bundle: Path, tmp_path: Path
) -> None:
    makers: dict[str, Callable[[], AbstractAsyncContextManager[list[Target]]]] = {
        "edge": partial(targets.tier, "edge", bundle, tmp_path),
        "cloud": partial(targets.tier, "cloud", bundle, tmp_path),
        "generation": partial(targets.generation, bundle, tmp_path),
        "authority": partial(targets.authority, tmp_path),
        "training": lambda: targets.training(train_bundle("deepseek_v3", tmp_path / "train")[1], tmp_path),
    }
    async with makers[service]() as found:
        for target in found:
            fuzzer = Fuzzer(target)
            assert (await fuzzer.say((b"\xff" * 10,)))[0] == "INVALID_REQUEST"
            report = await fuzzer.run(REFUSED)
            assert not report.faults
            assert report.refused >= REFUSED
            assert report.steps >= REFUSED // 50
            # What was mutated reaches what honest callers do not.
            assert report.reached.sum() > report.by_seeds.sum()
