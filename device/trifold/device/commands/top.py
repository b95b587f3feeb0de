"""`trifold top`: a site's sessions, links and versions, as the metrics of its processes tell them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from trifold.shared.errors import Unavailable
from trifold.shared.telemetry.scrape import Change, Scrape

_ADDRESSES: Final = ["127.0.0.1:9464", "127.0.0.1:9465", "127.0.0.1:9466"]

_WIDTH: Final = 160
"""Characters of a line where stdout is no terminal."""


def top(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HOST:PORT …",
            help=f"Where the processes show their metrics. [default: {' '.join(_ADDRESSES)}]",
            show_default=False,
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, help="Seconds from one look to the next.")
    ] = 2.0,
) -> None:
    """Watch a site: its sessions, links and versions. Where stdout is no terminal, one look at them."""
    # Services tell the whole URL.
    named = [address.removeprefix("http://").removesuffix("/metrics") for address in addresses or _ADDRESSES]
    watched = [Process(address) for address in named]
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    with ThreadPoolExecutor(len(watched)) as pool:
        _look(watched, pool)
        if not any(process.change for process in watched):
            raise Unavailable("; ".join(process.problem for process in watched))
        if not console.is_terminal:
            console.print(view(watched))
            return
        with suppress(KeyboardInterrupt), Live(view(watched), console=console, screen=True) as live:
            while True:
                time.sleep(interval)
                _look(watched, pool)
                live.update(view(watched), refresh=True)


@dataclass
class Process:
    """One that is watched: what happened in it of late, or why that is not known."""

    address: str
    change: Change | None = None
    problem: str = ""

    def look(self) -> None:
        try:
            now = Scrape.of(self.address)
        except Unavailable as error:
            self.change, self.problem = None, error.message
            return
        self.change, self.problem = Change(now, self.change.now if self.change else None), ""

    @property
    def tier(self) -> str:
        assert self.change
        if "trifold_train_sites" in self.change.now:
            return "training"
        return next(iter(self.change.now.labels("trifold_build_info", "tier")), "?")


def view(processes: Sequence[Process]) -> Group:
    """The tables. Rates and quantiles are of the time between two looks; at the first, since the start."""
    there = [(process, process.change) for process in processes if process.change]
    tables = [_sessions(there), _answers(there), _links(there), _versions(there)]
    shown = [part for table in tables for part in (table, "")]
    return Group(*shown, *(process.problem for process in processes if process.problem))


def _look(processes: Iterable[Process], pool: ThreadPoolExecutor) -> None:
    list(pool.map(Process.look, processes))


Found = Iterable[tuple[Process, Change]]


def _sessions(there: Found) -> Table:
    table = _table("Sessions", "", "running", "of", "waiting", "kept", "KV", "steps/s", "step p50", "p95")
    for heading in ("engine p50", "queue p95", "late p99", "CPU", "memory"):
        table.add_column(heading, justify="right")
    for process, change in there:
        now = change.now
        step, engine, queue = (f"trifold_{name}_seconds" for name in ("step", "compute_time", "queue_time"))
        table.add_row(
            process.tier,
            _count(now.value("trifold_num_requests_running")),
            _count(now.value("trifold_num_requests_limit")),
            _count(now.value("trifold_num_requests_waiting")),
            _count(now.value("trifold_num_sessions_leased")),
            _share(now.value("trifold_kv_cache_bytes") / now.value("trifold_kv_cache_limit_bytes")),
            _number(change.rate(f"{engine}_count")),
            _seconds(change.quantile(0.5, step)),
            _seconds(change.quantile(0.95, step)),
            _seconds(change.quantile(0.5, engine)),
            _seconds(change.quantile(0.95, queue)),
            _seconds(change.quantile(0.99, "trifold_event_loop_lag_seconds")),
            _share(change.rate("process_cpu_seconds_total")),
            _bytes(now.value("process_resident_memory_bytes")),
        )
    return table


def _answers(there: Found) -> Table:
    table = _table("Answers", "", "tokens/s", "first token p50", "p95", "per token p50", "p95")
    for heading in ("requests/s", "refused/s", "resumed/s"):
        table.add_column(heading, justify="right")
    for process, change in there:
        first, each = "trifold_time_to_first_token_seconds", "trifold_time_per_output_token_seconds"
        table.add_row(
            process.tier,
            _number(change.rate("trifold_generation_tokens_total")),
            _seconds(change.quantile(0.5, first)),
            _seconds(change.quantile(0.95, first)),
            _seconds(change.quantile(0.5, each)),
            _seconds(change.quantile(0.95, each)),
            _number(change.rate("trifold_request_success_total")),
            _number(change.rate("trifold_refusals_total")),
            _number(change.rate("trifold_resumes_total")),
        )
    return table


def _links(there: Found) -> Table:
    table = _table("Links", "", "seen by", "up/s", "down/s", "messages/s", "round trip p50", "p95")
    for process, change in there:
        counted = change.now.labels("trifold_link_bytes_total", "link")
        timed = change.now.labels("trifold_round_trip_seconds_count", "link")
        for link in dict.fromkeys([*counted, *timed]):
            table.add_row(
                link,
                process.tier,
                _bytes(change.rate("trifold_link_bytes_total", link=link, direction="up")),
                _bytes(change.rate("trifold_link_bytes_total", link=link, direction="down")),
                _number(change.rate("trifold_link_messages_total", link=link)),
                _seconds(change.quantile(0.5, "trifold_round_trip_seconds", link=link)),
                _seconds(change.quantile(0.95, "trifold_round_trip_seconds", link=link)),
            )
    return table


def _versions(there: Found) -> Table:
    table = _table(
        "Versions", "", "at", "Trifold", "bundle", "adapter", "computes on", "exact", "certificate"
    )
    for process, change in there:
        for series in change.now.series("trifold_build_info"):
            told = series.labels
            holds = change.now.value("trifold_certificate_expiry_timestamp_seconds") - change.now.at
            table.add_row(
                process.tier,
                process.address,
                told["version"],
                told["bundle"],
                told["adapter"],
                told["provider"],
                "yes" if change.now.value("trifold_exact") else "NO",
                _shown(holds, lambda seconds: f"{seconds / 3600:.1f} h"),
            )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def _shown(value: float, form: Callable[[float], str]) -> str:
    """What a process has not is left blank."""
    return "" if math.isnan(value) else form(value)


def _count(value: float) -> str:
    return _shown(value, lambda count: f"{count:.0f}")


def _number(value: float) -> str:
    return _shown(value, lambda number: f"{number:.1f}")


def _share(value: float) -> str:
    return _shown(value, lambda share: f"{share:.0%}")


def _seconds(value: float) -> str:
    return _shown(value, lambda seconds: f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s")


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return _shown(value, lambda gigabytes: f"{gigabytes:.1f} GB")
