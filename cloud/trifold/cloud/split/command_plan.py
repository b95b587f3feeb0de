"""`trifold plan`: where a model would be cut, and what that means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trifold.cloud.split import figures
from trifold.cloud.split import plan as planner
from trifold.cloud.split.cuts import parse_cuts, parse_ratio
from trifold.cloud.split.plan import Measure, Plan
from trifold.cloud.split.profiles import TierProfiles
from trifold.shared.bundle.manifest import TIERS, CodecName, Quantization
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields


def plan(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face folder; its config.json is enough.")],
    ratio: Annotated[str, typer.Option(help="Shares of cloud, edge and device.")] = "70/20/10",
    by: Annotated[Measure, typer.Option(help="What the ratio is of.")] = "params",
    cuts: Annotated[
        str, typer.Option(help="Cut before these two layers, such as 2/10, whatever the ratio.")
    ] = "",
    quant: Annotated[Quantization, typer.Option(help="How the shards hold matrices.")] = "int8",
    codec: Annotated[CodecName, typer.Option(help="How rows cross links.")] = "int8",
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of the prompt to plan for. (default 256, if there is room)")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Positions of KV to plan for. (default 1024, if the model has as many)"),
    ] = None,
    tiers: Annotated[
        Path | None, typer.Option(help="TOML file of machines and links, for times (docs/planning.md).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show where a model would be cut, what each tier would hold, and how fast that would be.

    With --tiers the exit code is 1 when a part does not fit its tier. docs/planning.md explains all figures.
    """
    result = planner.plan(
        family_of(Fields.load(checkpoint)).spec(),
        ratio=parse_ratio(ratio),
        cuts=parse_cuts(cuts),
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
    if result.predictions and not result.predictions[0].fits:
        raise typer.Exit(1)


def _show(plan: Plan, console: Console) -> None:
    size = f"{figures.count(plan.parameters)} parameters, {figures.count(plan.active)} active"
    console.print(f"[bold]{plan.family}[/]: {size}; weights {plan.quantization}, wire {plan.codec}")
    console.print(_tiers(plan), _links(plan))
    if plan.predictions:
        console.print(_predictions(plan))
    for line in plan.advice:
        console.print(f"[yellow]{line}[/]")
    if not plan.predictions:
        console.print("Times: give --tiers FILE (docs/planning.md)")


def _tiers(plan: Plan) -> Table:
    table = Table("", title=f"Cuts at layers {plan.cuts.edge} and {plan.cuts.cloud}", title_justify="left")
    parts = [plan.tiers[tier] for tier in TIERS]
    for tier in TIERS:
        table.add_column(tier, justify="right")
    spans = [range(part.first, part.stop) for part in parts]
    table.add_row("holds", *(figures.contents(tier, span) for tier, span in zip(TIERS, spans, strict=True)))
    table.add_row("parameters", *(figures.count(part.parameters) for part in parts))
    table.add_row("active", *(figures.count(part.active) for part in parts))
    table.add_row(f"share of {plan.by}", *(f"{part.share:.1f} %" for part in parts))
    if plan.ratio:
        table.add_row("asked for", *(f"{share:.1f} %" for share in plan.ratio))
    table.add_row("weights", *(figures.size(part.weight_bytes) for part in parts))
    table.add_row("KV of a position", *(figures.size(part.kv_bytes) for part in parts))
    table.add_row("memory", *(figures.size(part.memory) for part in parts))
    table.caption = f"memory: weights and one session's KV of {plan.context} positions"
    return table


def _links(plan: Plan) -> Table:
    table = Table("link", title="Bytes on the links", title_justify="left")
    for column in ("prompt up", "prompt down", "token up", "token down"):
        table.add_column(column, justify="right")
    for name, carried in plan.links.items():
        sizes = (carried.prompt_up, carried.prompt_down, carried.token_up, carried.token_down)
        table.add_row(name.replace("_", " – "), *(figures.size(size) for size in sizes))
    table.caption = f"a prompt of {plan.prompt} tokens; up is towards the cloud"
    return table


def _predictions(plan: Plan) -> Table:
    table = Table("model", title="Predicted by roofline", title_justify="left")
    for column in ("first token", "each token", "tokens a second", "fits"):
        table.add_column(column, justify="right")
    for each in plan.predictions:
        place = "split" if each.place == "split" else f"whole on the {each.place}"
        first, later = figures.duration(each.first_token), figures.duration(each.token)
        table.add_row(place, first, later, figures.rate(1 / each.token), "yes" if each.fits else "no")
    return table
