"""`python -m tests.bench [NAME …]`: the benchmarks; each prints a table for docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib
import logging

NAMES = {
    "identity": "tokens and rows of the split against the monolith's, with kills",
    "resume": "seconds without a token after a loss",
    "loopback": "the split over loopback against the monolith",
    "gateway": "OpenAI's client over HTTP against the SDK, 1 to 32 at once",
    "overload": "OpenAI's API asked for up to five times what it can give",
    "stalled": "memory of the tiers for callers that read nothing",
    "tls": "what TLS costs a token",
    "batching": "a core that computes the rows of sessions together against one that does not",
    "mixed": "sessions among 15 others, with cancels and admissions, against the monolith: the same bits?",
    "cores": "the core's engines on trifold-nano and on layers of two large shapes",
    "prefixes": "the first token behind a beginning that the core has computed before",
    "telemetry": "what metrics and traces cost a token",
    "speed": "the monolith against transformers and llama.cpp",
    "federated": "federated against local-only and centralized training, three seeds",
    "uplink": "bytes, loss and time of federated rounds over 20 Mbit/s, int8 against fp32",
    "variants": "what federated rounds travel as and how factors are averaged, three seeds",
    "hostile": "strategies with one site of five that flips the sign of its updates, three seeds",
    "kills": "federated runs in which processes are killed: the same adapter, bit for bit?",
    "memory": "peak memory and time of splitting a 6 GB checkpoint",
    "losses": "core and edge killed, links cut and stalled under load: tokens, and seconds without one",
    "fuzz": "malformed frames at every RPC, guided by the lines that they reach",
    "leak": "memory of the tiers over sessions with cancels and errors",
}
COUNTED = ("losses", "fuzz", "leak", "mixed")
"""May be cut short."""


def main() -> None:
    listed = "\n".join(f"  {name:10}{what}" for name, what in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=f"Benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; all by default")
    parser.add_argument("--count", type=int, help=f"how many, to cut {', '.join(COUNTED)} short")
    options = parser.parse_args()
    names = options.names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    counted = {} if options.count is None else {"count": options.count}
    if counted and (fixed := set(names) - set(COUNTED)):
        parser.error(f"--count is not for {', '.join(sorted(fixed))}")
    logging.getLogger("trifold").setLevel(logging.ERROR)  # that tiers are lost is no news here
    for name in names:
        print(f"\n## {name}: {NAMES[name]}\n", flush=True)
        importlib.import_module(f"tests.bench.{name}").main(**counted)


if __name__ == "__main__":
    main()
