"""What TLS on both links costs a token and the opening of a session: with and without it, in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.bench.nano import split_nano
from tests.identities import HOST, enrolled
from tests.processes import Processes
from trifold.cloud.authority.authority import Authority
from trifold.device import Client

TURNS: Final = 41
TOKENS: Final = 128


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        bundle = split_nano(root / "nano")
        authority = Authority.init(root / "authority", [HOST])
        core, edge, device = (enrolled(authority, root / role, role) for role in ("core", "edge", "device"))
        with (
            Processes(bundle, "--threads", "1") as plain,
            Processes(bundle, "--threads", "1", tls={"cloud": core, "edge": edge}) as tls,
            Client(plain.edge, bundle=bundle, threads=1) as without,
            Client(tls.edge, bundle=bundle, threads=1, tls=device) as with_tls,
        ):
            turns = [(_answer(without), _answer(with_tls)) for _ in range(TURNS)]
    print("| | first token, ms | ms a token |")
    print("|---|---|---|")
    for row, which in (("without TLS", 0), ("with TLS", 1)):
        first, rest = (statistics.median(turn[which][part] for turn in turns) for part in (0, 1))
        print(f"| {row} | {first:.2f} | {rest:.3f} |")
    added = [statistics.median(b[part] - a[part] for a, b in turns) for part in (0, 1)]
    print(f"| added, median of neighbours | {added[0]:+.2f} | {added[1]:+.3f} |")


def _answer(client: Client) -> tuple[float, float]:
    """Milliseconds to the first token, and for each one after it; connections are open already."""
    began = time.perf_counter()
    times = [
        time.perf_counter()
        for _ in client.generate("import os\n", max_tokens=TOKENS, eos=(), temperature=1, seed=1)
    ]
    return 1000 * (times[0] - began), 1000 * (times[-1] - times[0]) / (len(times) - 1)
