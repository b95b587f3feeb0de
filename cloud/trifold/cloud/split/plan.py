"""The planner: from a spec and a ratio to cuts, and what they mean. A pure function."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Final, Literal

from trifold.cloud.split import figures
from trifold.cloud.split.cuts import Shares, check_cuts, nearest_cuts
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
from trifold.shared.errors import InvalidRequest, PromptTooLong
from trifold.shared.model.parameters import of_model
from trifold.shared.model.spec import ModelSpec, Part

Measure = Literal["params", "active", "flops", "bytes"]
"""What the ratio is of: parameters, active parameters, operations for a token, or bytes of the shards."""

FAR: Final = 10
"""From how many points on a share that the layers cannot reach is worth a warning."""


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
    ratio: Shares | None
    """None where the cuts were given."""
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
    cuts: Cuts | None = None,
    by: Measure = "params",
    quantization: Quantization = "int8",
    codec: CodecName = "int8",
    prompt: int | None = None,
    context: int | None = None,
    profiles: TierProfiles | None = None,
) -> Plan:
    """The plan whose shares of cloud, edge and device come nearest to `ratio`, or that of given `cuts`.

    `context` is 1024 unless given, and `prompt` 256, or as much as there is room for. Raises InvalidRequest
    for a ratio, cuts or prompt that are impossible, PromptTooLong for a context that the model has not.
    """
    context = min(1024, spec.max_positions) if context is None else context
    if context > spec.max_positions:
        raise PromptTooLong(
            f"a context of {context} does not fit the {spec.max_positions} positions of the model"
        )
    prompt = min(256, context) if prompt is None else prompt
    if not 1 <= prompt <= context:
        raise InvalidRequest(f"a prompt of {prompt} tokens does not fit a context of {context}")
    embedding, head = footprint_of_embedding(spec, quantization), footprint_of_head(spec, quantization)
    layers = [footprint_of_layer(spec, index, quantization) for index in range(len(spec.layers))]
    wanted = _percent(ratio) if cuts is None else None
    if cuts is None:
        weights = [_measure(layer, by, context) for layer in layers]
        ends = (_measure(embedding, by, context), _measure(head, by, context))
        cuts = nearest_cuts(ends[0], weights, ends[1], _percent(ratio))
    check_cuts(cuts, len(layers))
    footprints: dict[Tier, Footprint] = {
        "cloud": sum(layers[cuts.edge : cuts.cloud], Footprint()),
        "edge": sum(layers[: cuts.edge], embedding),
        "device": sum(layers[cuts.cloud :], head),
    }
    attends = cuts.cloud < len(layers)
    links = traffic(spec, codec, prompt, attends=attends)
    roofline = Roofline(profiles, prompt, context) if profiles else None
    predictions = roofline.predict(footprints, links, attends=attends) if roofline else ()
    tiers = _tiers(footprints, cuts, len(layers), by, context)
    advice = _unreached(tiers, wanted) if wanted else []
    if profiles:
        advice += [*_room(footprints, context, profiles), *_faster_whole(predictions)]
    whole = of_model(spec)
    return Plan(
        family=spec.family,
        parameters=whole.total,
        active=whole.active,
        by=by,
        ratio=wanted,
        quantization=quantization,
        codec=codec,
        prompt=prompt,
        context=context,
        cuts=cuts,
        tiers=tiers,
        links=links,
        predictions=predictions,
        advice=tuple(advice),
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


def _unreached(tiers: Mapping[Tier, TierPlan], ratio: Shares) -> list[str]:
    """The warning that layers are too large to come near to the ratio."""
    shares = [(tier, tiers[tier].share, wanted) for tier, wanted in zip(TIERS, ratio, strict=True)]
    far = [
        f"{tier} {share:.0f} % instead of {wanted:.0f} %"
        for tier, share, wanted in shares
        if abs(share - wanted) > FAR
    ]
    return [f"Whole layers come no nearer to the ratio: {', '.join(far)}."] if far else []


def _room(footprints: Mapping[Tier, Footprint], context: int, profiles: TierProfiles) -> list[str]:
    """Which tiers have no room for their part."""
    needs = {tier: (footprints[tier].memory(context), profiles.machine(tier).memory) for tier in TIERS}
    return [
        f"The {tier}'s part needs {figures.size(need)}, and it has {figures.size(has)}."
        for tier, (need, has) in needs.items()
        if need > has
    ]


def _faster_whole(predictions: tuple[Prediction, ...]) -> list[str]:
    """The advice not to split, when a tier has room for the whole model and would be faster with it.

    Of equally fast tiers that nearest to the user: what stays there need not be trusted to anyone.
    """
    split, *whole = predictions
    fitting = [each for each in reversed(whole) if each.fits]
    best = min(fitting, key=lambda each: each.token, default=split)
    if best.token >= split.token:
        return []
    price = " (but token ids and text would go there)" if best.place == "cloud" else ""
    times = f"{figures.duration(best.token)} a token where the split takes {figures.duration(split.token)}"
    return [f"Not splitting would be faster: the whole model fits the {best.place}, with {times}{price}."]
