"""A federated run: rounds over Flower's Grid, stopped anywhere and resumed from the last whole one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any, Final

from flwr.serverapp import Grid
from safetensors.numpy import save

from trifold.cloud.federation.checkpoint import Checkpoint
from trifold.cloud.federation.exchange import Answers, Record, ask
from trifold.cloud.federation.folder import RunFolder
from trifold.cloud.federation.gate import Admission, Gate
from trifold.cloud.federation.metrics import Log, read
from trifold.cloud.federation.roster import Roster
from trifold.cloud.federation.strategy import Aggregator
from trifold.shared import durable
from trifold.shared.errors import Unavailable
from trifold.shared.federation.packing import pack, shapes_of

ADAPTER: Final = "adapter.safetensors"

Row = dict[str, Any]


class FederatedRun:
    """The rounds of one run folder, which holds settings, checkpoints, log and the adapter so far."""

    def __init__(self, folder: RunFolder, grid: Grid) -> None:
        self.folder = folder
        self.settings = folder.settings
        self._grid = grid
        self._log = Log(folder.path)
        self._aggregator = Aggregator(self.settings)
        begun = Checkpoint.last(folder.checkpoints)
        self._roster = Roster(
            grid,
            {"lora": self.settings.lora.model_dump_json()},
            lambda site, reason: self._log.write("refused", site=site, reason=reason),
            count=self.settings.sites,
            deadline=self.settings.deadline,
            model=begun.model if begun else None,
        )
        self._state = begun or self._begin()
        self._aggregator.restore(self._state.server)

    def run(self) -> Checkpoint:
        """The rounds that are left, then the sites' held-out loss with the last factors.

        Raises Unavailable when sites stay away for too long; the run can be resumed then.
        """
        if self._state.round:
            self._complete()
        while self._state.round < self.settings.rounds:
            self._state = self._round(self._state)
            self._state.save(self.folder.checkpoints)
            self._write_adapter()
            self._log.write("round", **self._state.row)
        self._evaluate()
        return self._state

    def _complete(self) -> None:
        """What a crash has left undone after the last checkpoint."""
        self._write_adapter()
        if not any(event.items() >= self._state.row.items() for event in read(self.folder.path)):
            self._log.write("round", **self._state.row)

    def _begin(self) -> Checkpoint:
        model, factors = self._roster.settle()
        state = Checkpoint.begin(model, factors, self.settings.seed)
        state.save(self.folder.checkpoints)
        return state

    def _round(self, state: Checkpoint) -> Checkpoint:
        began, number = time.monotonic(), state.round + 1
        generator = state.generator()
        for _ in range(self.settings.attempts):
            sites = self._roster.gather(self.settings.quorum)
            names = self._sample(list(sites), generator)
            row, admission = self._updates(state, number, {site: sites[site] for site in names})
            if len(admission.updates) >= self.settings.quorum:
                break
        else:
            raise Unavailable(
                f"round {number} had {len(admission.updates)} of the {self.settings.quorum} updates of its "
                f"quorum, {self.settings.attempts} times: {row['lost'] | row['refused']}. Resume the run"
            )
        factors = self._aggregator.aggregate(number, state.factors, admission.updates)
        row |= {"seconds": time.monotonic() - began}
        slowest = max(site["seconds"] for site in row["sites"].values())
        row |= {"overhead": max(0.0, row["seconds"] - slowest)}
        return Checkpoint(
            number,
            state.model,
            factors,
            self._aggregator.state(),
            dict(generator.bit_generator.state),
            state.taken | dict.fromkeys(admission.updates, number),
            row,
        )

    def _sample(self, sites: list[str], generator: Any) -> list[str]:
        """Sites for a round, by name: the same of the same, wherever they run today."""
        count = max(self.settings.quorum, round(self.settings.fraction * len(sites)))
        return sorted(generator.permutation(sites)[:count].tolist())

    def _updates(self, state: Checkpoint, number: int, sites: Mapping[str, int]) -> tuple[Row, Admission]:
        """What the sites answer in a round, through the gate; and the round's row of the history."""
        by_node = {node: site for site, node in sites.items()}
        packed = pack(state.factors, "fp32")
        self._log.write("asked", round=number, sites=list(sites))
        answers = ask(
            self._grid,
            "train",
            {node: self._task(state, number, site, packed) for site, node in sites.items()},
            deadline=self.settings.deadline,
            group=str(number),
            answered=lambda node, record: self._log.write(
                "answer", round=number, site=by_node[node], **_report(record)
            ),
            meanwhile=self._roster.glance,
        )
        for node in answers.lost:
            self._roster.forget(node)
        return self._admitted(state, number, by_node, answers, len(packed))

    def _task(self, state: Checkpoint, number: int, site: str, packed: bytes) -> Record:
        local = self.settings.local
        training = local.model_dump(exclude={"evaluate", "sequences", "length", "gradients"})
        training |= {
            "offset": (number - 1) * local.steps,
            "total_steps": self.settings.rounds * local.steps,
            "proximal": self._aggregator.proximal,
        }
        return {
            "run": self.folder.name,
            "round": number,
            "acknowledged": state.taken.get(site, 0),
            "serving_digest": state.model["serving_digest"],
            "base": hashlib.sha256(packed).hexdigest(),
            "update": self.settings.update,
            "seed": self.settings.seed,
            "sequences": local.sequences,
            "length": local.length,
            "evaluate": local.evaluate,
            "gradients": local.gradients,
            "lora": self.settings.lora.model_dump_json(),
            "training": json.dumps(training),
            "data": packed,
        }

    def _admitted(
        self, state: Checkpoint, number: int, by_node: Mapping[int, str], answers: Answers, down: int
    ) -> tuple[Row, Admission]:
        trained = state.factors
        if self.settings.lora.freeze_a:
            trained = {name: array for name, array in trained.items() if name.endswith(".lora_B")}
        settings = self.settings
        gate = Gate(shapes_of(trained), settings.update, settings.norm_ratio, settings.norm_bound)
        records = {by_node[node]: record for node, record in answers.records.items()}
        data = {site: record.get("data", b"") for site, record in records.items()}
        admission = gate.admit(data)
        lost = {by_node[node]: reason for node, reason in answers.lost.items()}
        for event, reasons in (("refused", admission.refused), ("lost", lost)):
            for site, reason in sorted(reasons.items()):
                self._log.write(event, round=number, site=site, reason=reason)
        row = {
            "round": number,
            "sites": {
                site: _report(record) | {"update_up": len(data[site]), "update_down": down}
                for site, record in sorted(records.items())
            },
            "refused": admission.refused,
            "lost": lost,
        }
        return row, admission

    def _write_adapter(self) -> None:
        """The factors after the last whole round, with what is needed to put them into a bundle."""
        lora = self.settings.lora
        described = {
            "run": self.folder.name,
            "round": str(self._state.round),
            "serving_digest": self._state.model["serving_digest"],
            "rank": str(lora.rank),
            "alpha": str(lora.alpha),
        }
        durable.write(self.folder.path / ADAPTER, save(dict(sorted(self._state.factors.items())), described))

    def _evaluate(self) -> None:
        """Each site's held-out loss with the last factors; a round tells that of those it began with."""
        if not self.settings.local.evaluate:
            return
        sites = self._roster.gather(self.settings.quorum)
        packed = pack(self._state.factors, "fp32")
        requests = {
            node: self._task(self._state, self._state.round + 1, site, packed) for site, node in sites.items()
        }
        answers = ask(self._grid, "evaluate", requests, deadline=self.settings.deadline)
        by_node = {node: site for site, node in sites.items()}
        losses = {by_node[node]: _report(record) for node, record in answers.records.items()}
        lost = {by_node[node]: reason for node, reason in answers.lost.items()}
        self._log.write("evaluation", round=self._state.round, sites=dict(sorted(losses.items())), lost=lost)


_REPORTED: Final[dict[str, type]] = {
    "seconds": float,
    "loss": float,
    "heldout": float,
    "rows_up": int,
    "rows_down": int,
    "gradients_up": int,
    "gradients_down": int,
}


def _report(record: Record) -> Row:
    """What a site says of its round: seconds, losses in nats, bytes. Nothing but these numbers is kept."""
    report: Row = {"seconds": 0.0}
    for name, kind in _REPORTED.items():
        value = record.get(name)
        if isinstance(value, int | float):
            report[name] = kind(value)
    return report
