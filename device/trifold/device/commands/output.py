"""What the device's commands print: text or JSON on stdout, traces on stderr."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from trifold.device.client.generation import Chunk
from trifold.device.client.trace import Trace


class Output:
    """Prints chunks as they come: their text, or one JSON object each."""

    def __init__(self, *, as_json: bool = False, trace: bool = False) -> None:
        self._as_json = as_json
        self._trace = trace

    def show(self, chunk: Chunk) -> None:
        if self._as_json:
            content = asdict(chunk)
            if not self._trace:
                del content["trace"]
            print(json.dumps(content), flush=True)
            return
        end = "\n" if chunk.finish_reason and sys.stdout.isatty() else ""
        print(chunk.text, end=end, flush=True)
        if self._trace and chunk.trace:
            print(line(chunk.trace), file=sys.stderr, flush=True)


def line(trace: Trace) -> str:
    """A trace in one line: milliseconds of every tier and link, bytes of every link."""
    parts = [f"position {trace.position}: {trace.total_ns / 1e6:.2f} ms"]
    parts += [
        f"{tier.tier} {tier.compute_ns / 1e6:.2f} + {tier.queue_ns / 1e6:.2f} queue ({tier.provider})"
        for tier in trace.tiers
    ]
    parts += [
        f"{link.link} {link.network_ns / 1e6:.2f} ({link.bytes_up} B up, {link.bytes_down} B down)"
        for link in trace.links
    ]
    notes = [
        "resumed" * trace.resumed,
        f"other engine: {', '.join(trace.changed)}" * bool(trace.changed),
        "not exact" * (not trace.exact),
    ]
    return "; ".join([*parts, *filter(None, notes)])
