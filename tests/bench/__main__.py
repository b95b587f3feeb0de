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
    "speed": "the monolith against transformers and llama.cpp",
    "federated": "federated against local-only and centralized training, three seeds",
    "uplink": "bytes, loss and time of federated rounds over 20 Mbit/s, int8 against fp32",
    "variants": "what federated rounds travel as and how factors are averaged, three seeds",
    "hostile": "strategies with one site of five that flips the sign of its updates, three seeds",
    "kills": "federated runs in which processes are killed: the same adapter, bit for bit?",
    "memory": "peak memory and time of splitting a 6 GB checkpoint",
}


def main() -> None:
    listed = "\n".join(f"  {name:10}{what}" for name, what in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=f"Benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; all by default")
    names = parser.parse_args().names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    logging.getLogger("trifold").setLevel(logging.ERROR)  # that tiers are lost is no news here
    for name in names:
        print(f"\n## {name}: {NAMES[name]}\n", flush=True)
        importlib.import_module(f"tests.bench.{name}").main()


if __name__ == "__main__":
    main()
