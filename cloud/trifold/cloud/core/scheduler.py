"""BatchScheduler: turns at the engine that the rows of many sessions take together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from time import perf_counter_ns
from typing import Any, TypeVar

from trifold.cloud.core.batching import BUDGET, Waiting, plan
from trifold.cloud.core.engines.engine import Engine, Part, check
from trifold.shared.runtime.shard import Rows
from trifold.shared.session.scheduler import Job, Lines, Outcomes, TurnScheduler
from trifold.shared.telemetry import metrics

T = TypeVar("T")


class RowJob(Job[T]):
    """Rows of a session that go through the engine in one batch or, if they are many, in several."""

    def __init__(self, key: Hashable, tenant: str, rows: int) -> None:
        """So many rows in all."""
        super().__init__(key, small=rows == 1)
        self.tenant = tenant
        self.rows = rows
        self.had = 0
        """Rows that batches have had."""
        self.granted = rows
        """Rows that the next batch has."""
        self.computed_ns = 0

    @abstractmethod
    def part(self) -> Part[Any] | None:
        """The rows granted, or fewer, which `granted` says then; none when the result is known without them.

        None when nobody wants them any more, and the result is None.
        """

    @abstractmethod
    def take(self, rows: Rows) -> None:
        """What became of the rows granted."""

    @abstractmethod
    def finish(self) -> T:
        """The result, when all rows have come."""


class BatchScheduler(TurnScheduler):
    """Continuous batching: while the engine works rows gather, and the next batch has them, up to a budget.

    So nobody waits for a batch to fill: whoever comes alone is computed alone, and the more come, the larger
    the batches. Other work, like making a cache, has turns of its own, and they come first.
    """

    def __init__(self, engine: Engine[Any], budget: int = BUDGET) -> None:
        self._engine = engine
        self._budget = min(budget, engine.most_rows)
        super().__init__()

    def pick(self, lines: Lines) -> Sequence[Job[Any]]:
        first = {key: line[0] for key, line in lines.items()}
        for job in first.values():
            if not isinstance(job, RowJob):
                return (job,)
        rows = {key: job for key, job in first.items() if isinstance(job, RowJob)}
        waiting = [Waiting(key, job.tenant, job.rows - job.had) for key, job in rows.items()]
        granted = plan(waiting, self._budget)
        for key, count in granted.items():
            rows[key].granted = count
        return [rows[key] for key in granted]

    def compute(self, jobs: Sequence[Job[Any]]) -> Outcomes:
        batch = [job for job in jobs if isinstance(job, RowJob)]
        return self._batch(batch) if batch else super().compute(jobs)

    def _batch(self, jobs: Sequence[RowJob[Any]]) -> Outcomes:
        began = perf_counter_ns()
        parts: dict[RowJob[Any], Part[Any]] = {}
        for job in jobs:
            try:
                part = job.part()
                if part is not None and job.granted:
                    check(part, self._engine.hidden)
                    parts[job] = part
                    continue
                value = None if part is None else job.finish()
            except Exception as error:
                yield job, error
                continue
            yield job, job.turn(value, job.computed_ns)
        if parts:
            metrics.BATCH_ROWS.observe(sum(job.granted for job in parts))
            metrics.BATCH_SESSIONS.observe(len(parts))
        for job, rows in zip(parts, self._run([*parts.values()]), strict=True):
            if isinstance(rows, Exception):
                yield job, rows
                continue
            job.had += job.granted
            try:
                job.take(rows)
                value = job.finish() if job.had == job.rows else None
            except Exception as error:
                yield job, error
                continue
            job.computed_ns += perf_counter_ns() - began
            if job.had == job.rows:
                yield job, job.turn(value, job.computed_ns)

    def _run(self, parts: Sequence[Part[Any]]) -> Sequence[Rows | Exception]:
        """Where a batch fails, each for itself: one session's fault is not the others'."""
        try:
            return self._engine.run(parts) if parts else []
        except Exception as error:
            if len(parts) == 1:
                return [error]
            return [rows for part in parts for rows in self._run([part])]
