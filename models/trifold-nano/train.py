"""Train trifold-nano: python train.py --work DIR (--hours H | --steps N) [--lr LR] [--workers W].

Reads DIR/train.bin and DIR/heldout.bin, writes DIR/checkpoint.pt every few minutes and on SIGTERM, and
goes on from it when it exists.  With --steps a resumed run repeats the uninterrupted one bit for bit (same
machine, same workers).  With --hours it does not: the learning rate then follows the clock, so that it
reaches zero on time however busy the machine is; weights, moments, balance and data position are still
restored exactly.

One process of one thread for each core, meeting once a step: beside other work this was measured several
times faster than one process of two threads, which by default spin at a barrier in every product.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from config import Config
from model import Model
from optimizer import build
from torch import Tensor

WINDOW = 1024
BATCH = 12
SEED = 1
WARMUP = 0.02
LONG_FROM = 0.85
BIAS_RATE = 0.003
SAVE_SECONDS = 240.0
EVALUATED = 24


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    work: Path
    hours: float | None
    steps: int | None
    lr: float
    workers: int


class Windows:
    """Token file seen as windows of WINDOW + 1 tokens, in a fresh random order for every pass."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.count = (len(self.tokens) - 1) // WINDOW
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def batch(self, positions: range, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the windows at these positions, each [windows * WINDOW / length, length]."""
        rows = []
        for position in positions:
            epoch, place = divmod(position, self.count)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng(SEED + epoch).permutation(self.count)
            start = int(self.order[place]) * WINDOW
            rows.append(self.tokens[start : start + WINDOW + 1].astype(np.int64))
        block = torch.from_numpy(np.stack(rows))
        return block[:, :-1].reshape(-1, length), block[:, 1:].reshape(-1, length)


def rate(progress: float) -> float:
    """Learning rate factor: linear warm-up, then linear to zero."""
    return max(0.0, min(progress / WARMUP, (1.0 - progress) / (1.0 - WARMUP), 1.0))


class Run:
    """The state of one training run and its loop, the same in every worker."""

    def __init__(self, rank: int, settings: Settings) -> None:
        self.rank, self.settings, self.checkpoint = rank, settings, settings.work / "checkpoint.pt"
        torch.manual_seed(SEED)
        self.model = Model(Config.load(Path(__file__).parent / "config.json"))
        self.model.initialise()
        self.optimizers = build(self.model, settings.lr)
        self.base = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.data, self.heldout = Windows(settings.work / "train.bin"), Windows(settings.work / "heldout.bin")
        self.step, self.seconds, self.progress, self.stopping = 0, 0.0, 0.0, False
        # Gradients are views of one buffer, so that one reduction carries them all; behind them lie the
        # expert loads and three scalars: loss, progress, wish to stop.
        self.params = list(self.model.parameters())
        self.size = sum(p.numel() for p in self.params)
        self.routers = self.model.routers()
        self.shared = torch.zeros(self.size + self.model.config.n_routed_experts * len(self.routers) + 3)
        start = 0
        for p in self.params:
            p.grad = self.shared[start : start + p.numel()].view_as(p)
            start += p.numel()
        if self.checkpoint.exists():
            self.load()

    def load(self) -> None:
        """Restore everything the next step depends on."""
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.progress = state["step"], state["seconds"], state["progress"]
        self.say(f"resumed at step {self.step}")

    def save(self) -> None:
        """The first worker writes the checkpoint beside the old one, then replaces it."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "progress": self.progress,
        }
        fresh = self.checkpoint.with_suffix(".tmp")
        torch.save(state, fresh)
        fresh.replace(self.checkpoint)

    def say(self, line: str) -> None:
        """Print once, not once per worker."""
        if self.rank == 0:
            print(line, flush=True)

    def part(self, start: int, count: int) -> range:
        """This worker's share of ``count`` positions from ``start``."""
        return range(start + self.rank, start + count, self.settings.workers)

    def advance(self) -> tuple[float, float, bool]:
        """One step; returns the loss, the load of the busiest expert over the mean, whether to stop."""
        factor = rate(self.progress)
        for optimizer, bases in zip(self.optimizers, self.base, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
        length = WINDOW if self.progress > LONG_FROM else WINDOW // 2
        self.shared.zero_()
        loss = self.model.loss(*self.data.batch(self.part(self.step * BATCH, BATCH), length))
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.steps is not None:
            progress = (self.step + 1) / self.settings.steps
        else:
            progress = self.seconds / ((self.settings.hours or 0.0) * 3600)
        loads = torch.cat([router.load.float() for router in self.routers])
        scalars = torch.tensor([float(loss.detach()), progress, float(self.stopping)])
        self.shared[self.size :] = torch.cat((loads, scalars))
        dist.all_reduce(self.shared)
        self.shared /= self.settings.workers
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        busiest = 0.0
        loads = self.shared[self.size : -3]
        for router, load in zip(self.routers, loads.chunk(len(self.routers)), strict=True):
            router.balance(load, BIAS_RATE * factor)
            busiest = max(busiest, float(load.max() / load.mean()))
        self.step, self.progress = self.step + 1, float(self.shared[-2])
        return float(self.shared[-3]), busiest, bool(self.shared[-1] > 0)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the first held-out windows, in the training precision."""
        loss = self.model.loss(*self.heldout.batch(self.part(0, EVALUATED), WINDOW // 2))
        dist.all_reduce(loss)
        return float(loss) / self.settings.workers

    def loop(self) -> None:
        """Train to the end or to a signal; a line every 20 steps."""
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        recent: list[float] = []
        mark, marked, stop = self.seconds, self.step, False
        while self.progress < 1.0 and not stop:
            loss, busiest, stop = self.advance()
            self.seconds = time.monotonic() - began
            recent.append(loss)
            if self.step % 20 == 0:
                speed = (self.step - marked) * BATCH * WINDOW / (self.seconds - mark)
                mark, marked = self.seconds, self.step
                left = self.seconds * (1 - self.progress) / max(self.progress, 1e-6)
                self.say(
                    f"step {self.step} {self.progress:6.1%} loss {sum(recent) / len(recent):.4f} "
                    f"load {busiest:.2f} {speed:.0f} tok/s {self.step * BATCH * WINDOW / 1e6:.2f}M tokens "
                    f"ETA {left / 60:.1f} min"
                )
                recent.clear()
            if self.step % 300 == 0:
                self.say(f"step {self.step} held-out {self.evaluate():.4f}")
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()
        self.say(f"stopped at step {self.step}, {self.seconds / 60:.1f} min, held-out {self.evaluate():.4f}")

    def stop(self, *_: object) -> None:
        """Signal handler: all workers finish the step under way, then the first saves."""
        self.stopping = True


def work(rank: int, settings: Settings, meeting: str) -> None:
    """Body of one worker process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=settings.workers)
    run = Run(rank, settings)
    signal.signal(signal.SIGTERM, run.stop)
    signal.signal(signal.SIGINT, run.stop)
    run.loop()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    settings = Settings(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(  # type: ignore[attr-defined, no-untyped-call]
            work, (settings, f"{folder}/meeting"), settings.workers, join=False, start_method="spawn"
        )
        assert context is not None

        def forward(number: int, _: object) -> None:
            for pid in context.pids():
                os.kill(pid, number)

        signal.signal(signal.SIGTERM, forward)
        while not context.join():
            pass


if __name__ == "__main__":
    main()
