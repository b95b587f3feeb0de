"""The page of a run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cloud.federations import LocalGrid, begin, run, sites
from trifold.cloud.federation.metrics import read
from trifold.cloud.federation.page import page


def test_the_page_of_a_run_has_a_curve_for_each_site_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    run(folder, LocalGrid(*sites(tmp_path)))
    text = page("clinics & schools", read(folder.path))
    assert "clinics &amp; schools" in text
    losses = text.partition("<h2>Megabytes")[0]
    assert losses.count("<polyline") == 3
    for site in ("clinic", "press", "school"):
        assert f">{site}</text>" in losses
    # Four rounds: the loss before the first, and after each.
    assert all(len(points.split()) == 5 for points in re.findall(r'points="([^"]*)"', losses))
    assert not re.findall(r"(?:src|href)=|https?://", text)


def test_the_page_of_a_run_that_has_not_begun_says_so(tmp_path: Path) -> None:
    assert "Nothing yet" in page("new", read(begin(tmp_path / "run").path))
