"""What `trifold generate` prints: text or JSON on stdout, traces on stderr."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.console import Console

from trifold.device.client.generation import Chunk
from trifold.device.client.trace import Trace
from trifold.device.commands.waterfall import tables


class Output:
    """Prints chunks as they come: their text, or one JSON object each. The traces of a text follow it."""

    def __init__(self, *, as_json: bool = False, trace: bool = False) -> None:
        self._as_json = as_json
        self._trace = trace
        self._traces: list[Trace] = []

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
            self._traces.append(chunk.trace)

    def end(self) -> None:
        """No chunk will follow."""
        if not self._traces:
            return
        console = Console(stderr=True, highlight=False)
        for table in tables(self._traces):
            console.print()
            console.print(table)
        for trace in self._traces:
            if trace.resumed:
                changed = f", with another engine in {', '.join(trace.changed)}" if trace.changed else ""
                console.print(f"Resumed before position {trace.position}{changed}.")
        if not all(trace.exact for trace in self._traces):
            console.print("Not exact: a tier has failed its self-test.")
