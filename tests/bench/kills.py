"""Federated runs in which processes are killed in mid-round: do they complete, and with the same adapter?

Three sites, SuperLink and training process on loopback. Each run has a process killed (SIGKILL) while its
second round is being computed, and started again some seconds later; where the ServerApp is killed, the run
is resumed. The adapter is compared with that of an undisturbed run, bit by bit.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.bench.nano import CHECKPOINT
from trifold.cloud.federation.metrics import read
from trifold.cloud.federation.run import ADAPTER
from trifold.cloud.split.split import split
from trifold.device.demo.federated.command import SETTINGS
from trifold.device.demo.federated.federation import Federation
from trifold.device.demo.federated.texts import write_texts
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.errors import TrifoldError
from trifold.shared.model.checkpoint import Checkpoint

ROUNDS: Final = 3
STEPS: Final = 12
WHILE_IN: Final = 2
"""The round that is hit."""

_INTO: Final = 3.0
"""Seconds into the round: its sites are training."""

_AWAY: Final = 5.0
"""Seconds until what was killed is started again."""

Loss = Callable[[Federation], None]


def main() -> None:
    losses: dict[str, Loss] = {
        "nothing": lambda federation: None,
        "ServerApp, resumed": _kill_server_app,
        "training process": lambda federation: _kill(federation, "training"),
        "a site's trainer": lambda federation: _kill(federation, "code-trainer"),
        "a site's node": lambda federation: _kill(federation, "code-node"),
        "a site, trainer and node": lambda federation: _kill(federation, "code-trainer", "code-node"),
        "SuperLink": lambda federation: _kill(federation, "superlink"),
    }
    with tempfile.TemporaryDirectory(prefix="trifold-bench-") as folder:
        root = Path(folder)
        bundle = root / "bundle"
        split(Checkpoint.open(CHECKPOINT), Cuts(edge=2, cloud=5), bundle, train=True)
        sites = write_texts(root / "texts")
        print("| killed | run, s | rounds | lost | adapter |")
        print("|---|---|---|---|---|")
        with Federation(root / "federation", bundle, sites, Path("deploy/flower")) as federation:
            undisturbed = None
            for number, (name, loss) in enumerate(losses.items()):
                run = root / f"run-{number}"
                seconds = _run(federation, run, loss)
                adapter = LoraFactors.load(run / ADAPTER).tensors
                undisturbed = undisturbed or adapter
                same = all(array.tobytes() == adapter[key].tobytes() for key, array in undisturbed.items())
                events = list(read(run))
                rounds = sum(event["event"] == "round" for event in events)
                lost = [f"{e['site']}: {e['reason']}" for e in events if e["event"] in ("lost", "refused")]
                shown = f"{'; '.join(lost) or 'none'} | {'the same bits' if same else 'another'}"
                print(f"| {name} | {seconds:.0f} | {rounds} of {ROUNDS} | {shown} |", flush=True)


def _run(federation: Federation, run: Path, loss: Loss) -> float:
    """Seconds of a run, in whose round `WHILE_IN` the loss happens."""
    began = time.monotonic()
    striking = threading.Thread(target=_strike, args=(federation, run, loss))
    striking.start()
    told = [*SETTINGS, f"rounds={ROUNDS}", f"local.steps={STEPS}"]
    try:
        federation.federate("run", str(run), *(word for item in told for word in ("--set", item)))
    except TrifoldError:
        federation.federate("resume", str(run))
    striking.join()
    return time.monotonic() - began


def _strike(federation: Federation, run: Path, loss: Loss) -> None:
    while not any(event["event"] == "asked" and event["round"] == WHILE_IN for event in read(run)):
        time.sleep(0.2)
    time.sleep(_INTO)
    loss(federation)


def _kill(federation: Federation, *names: str) -> None:
    for name in names:
        federation.kill(name)
    time.sleep(_AWAY)
    for name in names:
        federation.start(name)


def _kill_server_app(federation: Federation) -> None:
    """It is the child of what starts it for Flower."""
    starter = federation.processes["superexec"]
    for child in Path(f"/proc/{starter}/task/{starter}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
