"""Parts of the core on torch, by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trifold.cloud.core.engines.torch.feedforward import Mixture, gated
from trifold.cloud.core.engines.torch.matrix import Matrix
from trifold.cloud.core.engines.torch.router import route
from trifold.cloud.core.engines.torch.tiling import Tiling
from trifold.shared.model.spec import MoeFfn


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_computed_value_by_value_has_the_same_bits_wherever_it_lies(threads: int) -> None:
    """Threads share out the values of all rows, and so begin and end in the middle of some."""
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((303, 2 * 109), np.float32))
    spec = MoeFfn(experts=218, top_k=5, width=8, scoring="sigmoid", groups=2, group_score="top2")
    torch.set_num_threads(threads)
    for compute in (gated, lambda rows: route(rows, None, spec)[1]):
        together = compute(values)
        for row in range(len(values)):
            assert torch.equal(together[row], compute(values[row : row + 1])[0])
    torch.set_num_threads(1)


def test_of_equal_scores_the_router_takes_the_lower_numbers() -> None:
    spec = MoeFfn(experts=8, top_k=3, width=8, groups=4, top_groups=2)
    experts, weights = route(torch.zeros(2, 8), None, spec)
    assert experts.tolist() == [[0, 1, 2]] * 2
    assert torch.equal(weights, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("tiling", [Tiling(1), Tiling(4), Tiling(16, fixed=True)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 16, 17, 50])
def test_a_product_in_tiles_is_the_product(tiling: Tiling, rows: int) -> None:
    x, weight = torch.randn(rows, 20), torch.randn(24, 20)
    seen: list[int] = []

    def product(tile: torch.Tensor) -> torch.Tensor:
        seen.append(len(tile))
        return tile @ weight.T

    torch.testing.assert_close(tiling.over(x, product), x @ weight.T)
    assert all(count % tiling.multiple == 0 for count in seen)
    assert set(seen) == {16} or not tiling.fixed
    assert sum(seen) == tiling.padded(rows)


def test_int8_weights_are_within_half_a_step_of_their_row_and_products_are_theirs() -> None:
    values = torch.randn(600, 900) * torch.logspace(-3, 3, 600)[:, None]
    values[7] = 0
    matrix = Matrix.blank(600, 900, weights="int8", compute=torch.float32, device=torch.device("cpu"))
    matrix.put(values, (slice(None),))
    assert matrix.scale is not None
    kept = matrix.weight * matrix.scale[:, None]
    assert ((kept - values).abs() <= matrix.scale[:, None] * 0.5001).all()
    assert (matrix.weight.abs().amax(-1) == 127).sum() == 599
    x, size = torch.randn(5, 900), kept.norm(dim=-1) + 1
    torch.testing.assert_close(matrix.product(x, Tiling(4)) / size, x @ kept.T / size)


def test_experts_by_the_grouped_product_are_those_one_by_one() -> None:
    """The form for CUDA, which torch has for CPUs too; one expert has no rows."""
    spec = MoeFfn(experts=5, top_k=2, width=16)
    stacks = [torch.randn(5, *shape).bfloat16() / 5 for shape in ((32, 24), (24, 16))]
    into, out_of = (Matrix(stack, None, torch.bfloat16) for stack in stacks)
    mixture = Mixture(spec, into, None, into, out_of, None)
    rows, experts = torch.randn(9, 24), torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 4])
    one_by_one = mixture._each(rows, experts, Tiling(4))
    torch.testing.assert_close(mixture._grouped(rows, experts), one_by_one, rtol=0.02, atol=0.02)
