"""Figures as people read them, in what `trifold plan` and `trifold split` print."""

from __future__ import annotations

from trifold.shared.bundle.manifest import Tier


def contents(tier: Tier, layers: range) -> str:
    """What a tier holds: "embedding, layers 0–3", "layer 4", "norm, head"."""
    before = {"edge": ["embedding"]}.get(tier, [])
    after = {"device": ["norm", "head"]}.get(tier, [])
    return ", ".join([*before, *_span(layers), *after])


def count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def size(number: float) -> str:
    """Of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    # From 999.5 ms on, three digits would round to 1e+03 ms.
    return f"{seconds:,.2f} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"


def rate(number: float) -> str:
    """Of tokens a second."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _span(layers: range) -> list[str]:
    match len(layers):
        case 0:
            return []
        case 1:
            return [f"layer {layers[0]}"]
        case _:
            return [f"layers {layers[0]}–{layers[-1]}"]
