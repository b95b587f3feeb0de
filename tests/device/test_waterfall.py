"""The waterfall of the demo."""

from __future__ import annotations

import pytest

from trifold.device.client.trace import LinkUse, TierTime, Trace
from trifold.device.demo.waterfall import Waterfall


def trace(scale: int) -> Trace:
    return Trace(
        position=9,
        steps=1,
        rows=1,
        tiers=(
            TierTime("device", "CPU", 0, 100_000 * scale, 120_000 * scale),
            TierTime("edge", "CPU", 10_000 * scale, 200_000 * scale, 900_000 * scale),
            TierTime("cloud", "CPU", 0, 400_000 * scale, 420_000 * scale),
        ),
        links=(
            LinkUse("device-edge", 40, 300, 50_000 * scale),
            LinkUse("edge-cloud", 290, 280, 70_000 * scale),
        ),
        total_ns=1_000_000 * scale,
        row_digest="",
        exact=True,
        resumed=False,
        changed=(),
    )


def test_a_waterfall_is_the_mean_of_its_traces_in_the_order_of_the_way() -> None:
    waterfall = Waterfall.of([trace(1), trace(3)])
    assert waterfall.milliseconds == pytest.approx(2.0)
    places = ["device-edge", "edge", "edge", "edge-cloud", "cloud", "cloud", "device"]
    assert [span.where for span in waterfall.spans] == places
    times = [0.1, 0.02, 0.4, 0.14, 0.0, 0.8, 0.2]
    assert [span.milliseconds for span in waterfall.spans] == pytest.approx(times)
    assert (waterfall.spans[3].bytes_up, waterfall.spans[3].bytes_down) == (290, 280)


def test_the_bars_of_a_waterfall_follow_each_other_and_fill_its_width() -> None:
    bars = [str(cell) for cell in Waterfall.of([trace(1)]).table("x", width=40).columns[-1].cells]
    ends = [len(bar.replace("[yellow]", "").replace("[cyan]", "").replace("[/]", "")) for bar in bars]
    assert ends[-1] == 40
    assert ends == sorted(ends)
