from __future__ import annotations

import numpy as np
import pytest

from tests.cloud.federations import SHAPES, drawn
from trifold.cloud.federation.gate import Gate
from trifold.shared.federation.packing import Arrays, pack

GATE = Gate(SHAPES, "fp32", ratio=10, bound=1e4)


def scaled(factor: float) -> Arrays:
    return {name: np.float32(factor) * array for name, array in drawn(1).items()}


def test_updates_in_line_pass_unchanged() -> None:
    admission = GATE.admit({"a": pack(scaled(1), "fp32"), "b": pack(scaled(3), "fp32")})
    assert not admission.refused
    assert all(np.array_equal(admission.updates["b"][name], scaled(3)[name]) for name in SHAPES)


@pytest.mark.parametrize("count", [2, 4])
def test_a_norm_100_times_that_of_others_is_refused_even_of_three_sites(count: int) -> None:
    packed = {f"honest-{number}": pack(scaled(1 + number / 10), "fp32") for number in range(count)}
    admission = GATE.admit(packed | {"loud": pack(scaled(100), "fp32")})
    assert set(admission.refused) == {"loud"}
    assert "times that of the other sites" in admission.refused["loud"]
    assert set(admission.updates) == set(packed)


def test_a_faint_site_does_not_get_the_only_other_one_refused() -> None:
    assert not GATE.admit({"honest": pack(scaled(1), "fp32"), "faint": pack(scaled(1e-6), "fp32")}).refused
    refused = GATE.admit({"honest": pack(scaled(1), "fp32"), "loud": pack(scaled(1e5), "fp32")}).refused
    assert set(refused) == {"loud"}


def test_a_site_alone_is_held_to_the_bound() -> None:
    assert not GATE.admit({"a": pack(scaled(100), "fp32")}).refused
    refused = GATE.admit({"a": pack(scaled(1e5), "fp32")}).refused
    assert "above the bound 10000" in refused["a"]


@pytest.mark.parametrize(
    ("value", "named"), [(np.nan, "NaN"), (np.inf, "an infinite value"), (-np.inf, "an infinite value")]
)
def test_a_value_that_is_not_finite_is_refused_naming_the_factor(value: float, named: str) -> None:
    data = bytearray(pack(scaled(1), "fp32"))
    data[-4:] = np.float32(value).tobytes()
    assert GATE.admit({"a": bytes(data)}).refused == {"a": f"m.q_proj.lora_B holds {named}"}


@pytest.mark.parametrize("scale", [b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"])
def test_int8_scales_that_are_not_finite_are_refused(scale: bytes) -> None:
    data = bytearray(pack(scaled(1), "int8"))
    data[36:38] = scale
    assert "m.q_proj.lora_A holds" in Gate(SHAPES, "int8", 10, 1e4).admit({"a": bytes(data)}).refused["a"]


def test_sites_that_stand_still_are_no_reason_to_refuse_those_that_learn() -> None:
    packed = {name: pack(scaled(0), "fp32") for name in ("a", "b", "c")}
    assert not GATE.admit(packed | {"learner": pack(scaled(1), "fp32")}).refused
