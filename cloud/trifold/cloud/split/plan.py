"""The planner: from a spec and a ratio to cuts, and what they mean. A pure function."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Literal

from trifold.cloud.split.cuts import Shares, nearest_cuts
from trifold.cloud.split.footprint import (
    Footprint,
    footprint_of_embedding,
    footprint_of_head,
    footprint_of_layer,
)
from trifold.cloud.split.prediction import Prediction, Roofline
from trifold.cloud.split.profiles import TierProfiles
from trifold.cloud.split.traffic import LinkName, Traffic, traffic
from trifold.shared.bundle.manifest import TIERS, CodecName, Cuts, Quantization, Tier
from trifold.shared.errors import InvalidRequest
from trifold.shared.model.parameters import of_model
from trifold.shared.model.spec import ModelSpec, Part

Measure = Literal["params", "active", "flops", "bytes"]
"""What the ratio is of: parameters, active parameters, operations for a token, or bytes of the shards."""


class TierPlan(Part):
    """What a tier holds: layers [first, stop), and the embedding (edge) or final norm and head (device)."""

    first: int
    stop: int
    parameters: int
    active: int
    share: float
    """In percent of all tiers, by the measure of the plan."""
    weight_bytes: int
    kv_bytes: int
    """KV of one position."""
    memory: int
    """Bytes of weights, and of one session's KV for the positions of the plan's context."""


class Plan(Part):
    """Cuts and what they mean, for a prompt of `prompt` tokens in a context of `context` positions."""

    family: str
    parameters: int
    active: int
    by: Measure
    ratio: Shares
    quantization: Quantization
    codec: CodecName
    prompt: int
    context: int
    cuts: Cuts
    tiers: dict[Tier, TierPlan]
    links: dict[LinkName, Traffic]
    predictions: tuple[Prediction, ...]
    """Split first; empty without tier profiles."""
    advice: tuple[str, ...]


def plan(
    spec: ModelSpec,
    *,
    ratio: Shares = (70, 20, 10),
    by: Measure = "params",
    quantization: Quantization = "int8",
    codec: CodecName = "int8",
    prompt: int = 256,
    context: int = 1024,
    profiles: TierProfiles | None = None,
) -> Plan:
    """The plan whose shares of cloud, edge and device come nearest to `ratio`.

    `context` is cut to what the model can. Raises InvalidRequest for a ratio, prompt or context that is
    impossible.
    """
    context = min(context, spec.max_positions)
    if not 1 <= prompt <= context:
        raise InvalidRequest(f"a prompt of {prompt} tokens does not fit a context of {context}")
    embedding, head = footprint_of_embedding(spec, quantization), footprint_of_head(spec, quantization)
    layers = [footprint_of_layer(spec, index, quantization) for index in range(len(spec.layers))]
    weights = [_measure(layer, by, context) for layer in layers]
    ends = (_measure(embedding, by, context), _measure(head, by, context))
    cuts = nearest_cuts(ends[0], weights, ends[1], _percent(ratio))
    footprints: dict[Tier, Footprint] = {
        "cloud": sum(layers[cuts.edge : cuts.cloud], Footprint()),
        "edge": sum(layers[: cuts.edge], embedding),
        "device": sum(layers[cuts.cloud :], head),
    }
    attends = cuts.cloud < len(layers)
    links = traffic(spec, codec, prompt, attends=attends)
    roofline = Roofline(profiles, prompt, context) if profiles else None
    predictions = roofline.predict(footprints, links, attends=attends) if roofline else ()
    whole = of_model(spec)
    return Plan(
        family=spec.family,
        parameters=whole.total,
        active=whole.active,
        by=by,
        ratio=_percent(ratio),
        quantization=quantization,
        codec=codec,
        prompt=prompt,
        context=context,
        cuts=cuts,
        tiers=_tiers(footprints, cuts, len(layers), by, context),
        links=links,
        predictions=predictions,
        advice=(*_room(footprints, context, profiles), *_faster_whole(predictions)) if profiles else (),
    )


def _percent(ratio: Shares) -> Shares:
    if not (min(ratio) >= 0 and 0 < sum(ratio) < inf):
        raise InvalidRequest("a ratio is three shares that are not all 0, such as 70/20/10")
    cloud, edge, device = (share / sum(ratio) * 100 for share in ratio)
    return cloud, edge, device


def _measure(footprint: Footprint, by: Measure, context: int) -> float:
    match by:
        case "params":
            return footprint.parameters.total
        case "active":
            return footprint.parameters.active
        case "flops":
            return footprint.operations(context)
        case "bytes":
            return footprint.weight_bytes


def _tiers(
    footprints: Mapping[Tier, Footprint], cuts: Cuts, layers: int, by: Measure, context: int
) -> dict[Tier, TierPlan]:
    spans = {"cloud": (cuts.edge, cuts.cloud), "edge": (0, cuts.edge), "device": (cuts.cloud, layers)}
    measures = {tier: _measure(footprint, by, context) for tier, footprint in footprints.items()}
    return {
        tier: TierPlan(
            first=spans[tier][0],
            stop=spans[tier][1],
            parameters=footprint.parameters.total,
            active=footprint.parameters.active,
            share=measures[tier] / sum(measures.values()) * 100,
            weight_bytes=footprint.weight_bytes,
            kv_bytes=footprint.kv_bytes,
            memory=footprint.memory(context),
        )
        for tier, footprint in footprints.items()
    }


def _room(footprints: Mapping[Tier, Footprint], context: int, profiles: TierProfiles) -> list[str]:
    """Which tiers have no room for their part."""
    needs = {tier: (footprints[tier].memory(context), profiles.machine(tier).memory) for tier in TIERS}
    return [
        f"The {tier}'s part needs {need / 1e9:.2f} GB, and it has {has / 1e9:.2f} GB."
        for tier, (need, has) in needs.items()
        if need > has
    ]


def _faster_whole(predictions: tuple[Prediction, ...]) -> list[str]:
    """The advice not to split, when a tier has room for the whole model and would be faster with it."""
    split, *whole = predictions
    best = min((each for each in whole if each.fits), key=lambda each: each.token, default=split)
    if best.token >= split.token:
        return []
    price = " (but token ids and text would go there)" if best.place == "cloud" else ""
    times = f"{best.token * 1e3:.3g} ms a token where the split takes {split.token * 1e3:.3g} ms"
    return [f"Not splitting would be faster: the whole model fits the {best.place}, with {times}{price}."]
