"""`trifold plan`: where a model would be cut, and what that means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trifold.cloud.split import plan as planner
from trifold.cloud.split.plan import Measure, Plan
from trifold.cloud.split.profiles import TierProfiles
from trifold.shared.bundle.manifest import TIERS, CodecName, Quantization
from trifold.shared.errors import InvalidRequest
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields


def plan(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder; its config.json is enough.")],
    ratio: Annotated[str, typer.Option(help="Shares of cloud, edge and device.")] = "70/20/10",
    by: Annotated[Measure, typer.Option(help="What the ratio is of.")] = "params",
    quant: Annotated[Quantization, typer.Option(help="How the shards hold matrices.")] = "int8",
    codec: Annotated[CodecName, typer.Option(help="How rows cross links.")] = "int8",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt to plan for.")] = 256,
    context: Annotated[int, typer.Option(help="Positions of KV to plan for.")] = 1024,
    tiers: Annotated[Path | None, typer.Option(help="TOML file of machines and links.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show where a model would be cut, what each tier would hold, and how fast that would be."""
    result = planner.plan(
        family_of(Fields.load(checkpoint)).spec(),
        ratio=parse_ratio(ratio),
        by=by,
        quantization=quant,
        codec=codec,
        prompt=prompt,
        context=context,
        profiles=TierProfiles.load(tiers) if tiers else None,
    )
    if json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        _show(result, Console())


def parse_ratio(text: str) -> tuple[float, float, float]:
    """ "70/20/10" as numbers. Raises InvalidRequest for anything else."""
    try:
        cloud, edge, device = (float(part) for part in text.split("/"))
    except ValueError as error:
        raise InvalidRequest(f"--ratio {text!r} is not three numbers such as 70/20/10") from error
    return cloud, edge, device


def _show(plan: Plan, console: Console) -> None:
    size = f"{_count(plan.parameters)} parameters, {_count(plan.active)} active"
    console.print(f"[bold]{plan.family}[/]: {size}; weights {plan.quantization}, wire {plan.codec}")
    console.print(_tiers(plan), _links(plan))
    if plan.predictions:
        console.print(_predictions(plan))
    for line in plan.advice:
        console.print(f"[yellow]{line}[/]")


def _tiers(plan: Plan) -> Table:
    table = Table("", title=f"Cuts at layers {plan.cuts.edge} and {plan.cuts.cloud}", title_justify="left")
    parts = [plan.tiers[tier] for tier in TIERS]
    for tier in TIERS:
        table.add_column(tier, justify="right")
    layers = [_span(part.first, part.stop - 1) for part in parts]
    table.add_row("holds", layers[0], _listed("embedding", layers[1]), _listed(layers[2], "norm, head"))
    table.add_row("parameters", *(_count(part.parameters) for part in parts))
    table.add_row("active", *(_count(part.active) for part in parts))
    table.add_row(f"share of {plan.by}", *(f"{part.share:.1f} %" for part in parts))
    table.add_row("asked for", *(f"{share:.1f} %" for share in plan.ratio))
    table.add_row("weights", *(_bytes(part.weight_bytes) for part in parts))
    table.add_row("KV of a position", *(_bytes(part.kv_bytes) for part in parts))
    table.add_row("memory", *(_bytes(part.memory) for part in parts))
    table.caption = f"memory: weights and one session's KV of {plan.context} positions"
    return table


def _links(plan: Plan) -> Table:
    table = Table("link", title="Bytes on the links", title_justify="left")
    for column in ("prompt up", "prompt down", "token up", "token down"):
        table.add_column(column, justify="right")
    for name, carried in plan.links.items():
        sizes = (carried.prompt_up, carried.prompt_down, carried.token_up, carried.token_down)
        table.add_row(name.replace("_", " – "), *(_bytes(size) for size in sizes))
    table.caption = f"a prompt of {plan.prompt} tokens; up is towards the cloud"
    return table


def _predictions(plan: Plan) -> Table:
    table = Table("model", title="Predicted by roofline", title_justify="left")
    for column in ("first token", "each token", "tokens a second", "fits"):
        table.add_column(column, justify="right")
    for each in plan.predictions:
        place = "split" if each.place == "split" else f"whole on the {each.place}"
        times = (_seconds(each.first_token), _seconds(each.token), f"{1 / each.token:.3g}")
        table.add_row(place, *times, "yes" if each.fits else "no")
    return table


def _span(first: int, last: int) -> str:
    if first > last:
        return ""
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
