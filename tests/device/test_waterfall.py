"""The waterfall of a generation."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from trifold.device.client.generation import Chunk
from trifold.device.client.trace import LinkUse, TierTime, Trace
from trifold.device.commands.waterfall import Waterfall
from trifold.device.demo.completion import Completion


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


def test_a_waterfall_tells_how_many_positions_were_not_computed() -> None:
    *others, cloud = trace(1).tiers
    with_prefix = replace(trace(1), tiers=(*others, replace(cloud, reused=128)))
    told = [span.what for span in Waterfall.of([with_prefix]).spans]
    assert told == [
        "network",
        "queue",
        "compute, CPU",
        "network",
        "queue",
        "compute, CPU, 128 reused",
        "compute, CPU",
    ]


def test_the_bars_of_a_waterfall_follow_each_other_and_fill_its_width() -> None:
    bars = [str(cell) for cell in Waterfall.of([trace(1)]).table("x", width=40).columns[-1].cells]
    ends = [len(bar.replace("[yellow]", "").replace("[cyan]", "").replace("[/]", "")) for bar in bars]
    assert ends[-1] == 40
    assert ends == sorted(ends)


def test_a_single_token_has_neither_a_mean_of_others_nor_a_rate() -> None:
    completion = Completion("x", [Chunk("", (0,), "stop", trace(1))], 2.0)
    report = completion.as_dict()
    assert report["first_token"]["tokens"] == 1
    assert (report["token"], report["tokens_per_second"]) == (None, None)
    shown = io.StringIO()
    completion.print(Console(file=shown))
    assert "1 token; the model stopped" in shown.getvalue()
    assert "Every other token" not in shown.getvalue()


def test_a_completion_tells_its_rate_and_the_mean_of_all_but_the_first_token() -> None:
    completion = Completion("x", [Chunk("a", (1,), None, trace(n)) for n in (9, 1, 3)], 2.0)
    report = completion.as_dict()
    assert report["tokens_per_second"] == 1.5
    assert (report["token"]["tokens"], report["token"]["milliseconds"]) == (2, pytest.approx(2.0))
