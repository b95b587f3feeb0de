"""The engine on TensorRT, built and run: only where TensorRT and a GPU are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cloud.tensorrt_graphs import CUTS, by_the_float_model, error, some_rows
from tests.shared.sites import train_bundle
from trifold.cloud.core.engines.engine import Part
from trifold.cloud.core.engines.tensorrt.device import Device
from trifold.cloud.core.engines.tensorrt.engine import TensorRtEngine
from trifold.cloud.core.engines.tensorrt.library import check_builder
from trifold.cloud.core.engines.tensorrt.plans import Plans
from trifold.cloud.core.engines.tensorrt.precision import Precision
from trifold.cloud.core.engines.tensorrt.profiles import Limits
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import ConfigError

MOST: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.1}


@pytest.fixture(autouse=True)
def _there() -> None:
    try:
        check_builder()
        Device()
    except ConfigError as error:
        pytest.skip(error.message)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("precision", MOST)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama"])
def test_a_built_engine_gives_the_rows_of_the_float_model(
    family: str, precision: Precision, portable: bool, tmp_path: Path
) -> None:
    _, bundle = train_bundle(family, tmp_path, cuts=CUTS)
    folder, plans = TierFolder.open(bundle, "cloud"), Plans(tmp_path / "plans")
    limits = Limits(sessions=4, positions=200, rows=64)
    for _ in range(2):  # built, then found again
        engine = TensorRtEngine.load(
            folder, precision=precision, limits=limits, portable=portable, plans=plans
        )
        sessions = [some_rows(length, seed) for seed, length in enumerate((70, 40))]
        caches = [engine.cache(len(rows)) for rows in sessions]
        out = [engine.run([Part(cache, rows[:30], 0)]) for cache, rows in zip(caches, sessions, strict=True)]
        for at in range(30, 40):
            pairs = zip(caches, sessions, strict=True)
            rows = engine.run([Part(cache, all_rows[at : at + 1], at) for cache, all_rows in pairs])
            for parts, row in zip(out, rows, strict=True):
                parts.append(row)
        out[0] += engine.run([Part(caches[0], sessions[0][40:], 40)])
        found = [np.concatenate(parts) for parts in out]
        assert error(found, by_the_float_model(bundle, sessions)) < MOST[precision]
        print(engine.fingerprint, "exact" if engine.exact else "NOT exact")
    assert len([*plans.folder.glob("*.plan")]) == 1
    assert [*plans.folder.glob("*.timings")]
