"""SiteTrainer: a site's float shards with LoRA and its text, warm from round to round."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trifold.edge.federation.core import RemoteCore
from trifold.edge.federation.frames import Record
from trifold.edge.federation.text import SiteText
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import CodecName
from trifold.shared.errors import DeadlineExceeded, DigestMismatch, InvalidRequest
from trifold.shared.federation.feedback import ErrorFeedback
from trifold.shared.federation.packing import Arrays, Kind, pack, shapes_of, unpack
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.training.cache import RowCache
from trifold.shared.training.lora import LoraSettings, add_lora, factors, load_factors
from trifold.shared.training.shard import TorchShard
from trifold.shared.training.site import SiteModel
from trifold.shared.training.slices import FloatSlice
from trifold.shared.training.training import TrainSettings, evaluate, train

T = TypeVar("T")

_TRAFFIC: Final = ("rows_up", "rows_down", "gradients_up", "gradients_down")


class Task(BaseModel):
    """What a round asks of a site; the factors that it begins with come beside it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    # Part of a path at the site.
    run: str = Field(pattern="^[0-9A-Za-z]{1,64}$")
    round: int = Field(ge=1)
    acknowledged: int = Field(ge=0)
    serving_digest: str
    base: str
    update: Kind
    seed: int
    sequences: int = Field(ge=1)
    length: int = Field(ge=1)
    evaluate: int = Field(ge=0)
    gradients: CodecName
    lora: str
    training: str
    # The site's own word, where it has one: the time.monotonic() at which the server stops waiting.
    expires: float | None = None


class SiteTrainer:
    """Does what rounds ask, for one site or, in a simulation, for several in turn.

    A round is a function of its task and of what the site keeps on disk (the residual of earlier updates): a
    trainer that was killed half-way and asked again takes the same steps. AdamW's moments begin anew in each
    round, since the factors that they belong to are not the ones that a round begins with.
    """

    def __init__(
        self,
        edge: TierFolder,
        device: TierFolder,
        texts: Mapping[str, SiteText],
        core: Callable[[CodecName], RemoteCore],
        state: Path,
    ) -> None:
        """`core` connects to the training process with a codec for gradients; `state` is a folder."""
        self._slices = FloatSlice.open(edge), FloatSlice.open(device)
        self._manifest = edge.manifest
        self._texts = dict(sorted(texts.items()))
        self._connect = core
        self._state = state
        self._gradients: CodecName = "int8"
        self._core = core(self._gradients)
        self._lora: LoraSettings | None = None
        self._model: SiteModel | None = None
        self._initial: Arrays = {}

    def answer(self, request: Record) -> Record:
        """The answer to a record of the ClientApp. Raises a TrifoldError that says what was wrong with it."""
        site = self._site(request)
        match request.get("action"):
            case "describe":
                return self._describe(site, _lora(request.get("lora")))
            case "train":
                return self._train(site, _task(request), request["data"])
            case "evaluate":
                return self._evaluate(site, _task(request), request["data"])
            case other:
                raise InvalidRequest(f"a trainer does not know the action {other!r}")

    def _site(self, request: Record) -> str:
        """The site that is asked: the only one, or that of Flower's partition."""
        names = list(self._texts)
        if len(names) > 1 and "partition" not in request:
            raise InvalidRequest(f"this trainer holds the texts of {len(names)} sites, for a simulation only")
        return names[int(request.get("partition", 0)) % len(names)]

    def _describe(self, site: str, lora: LoraSettings) -> Record:
        self._prepare(lora, self._gradients)
        # A run that counted on this site would find out in its first round.
        self._core.check()
        shapes = shapes_of(self._initial)
        return {
            "site": site,
            "serving_digest": self._manifest.serving_digest,
            "shapes": json.dumps(shapes),
            "data": pack(self._initial, "fp32"),
        }

    def _train(self, site: str, task: Task, packed: bytes) -> Record:
        began = time.monotonic()
        feedback = ErrorFeedback(self._state / "residuals", task.run, site)
        feedback.settle(task.acknowledged)
        proposal = feedback.proposed(task.round, task.base)
        if proposal is None:
            model, base = self._begin(task, packed)
            with self._counted() as report:
                report |= self._heldout(model, site, task)
                settings = _settings(task.training)
                start = (task.round - 1) * settings.steps * settings.accumulate
                batches = self._texts[site].batches(
                    task.sequences, task.length, seed=_seed(task.seed, site), start=start
                )
                losses = train(model, batches, settings)
            report["loss"] = float(np.mean(losses))
            trained = factors(model.shards, trained_only=True)
            update = {name: array - base[name] for name, array in trained.items()}
            proposal = feedback.propose(task.round, task.base, update, task.update, report)
        return proposal.report | {"seconds": time.monotonic() - began, "data": proposal.data}

    def _evaluate(self, site: str, task: Task, packed: bytes) -> Record:
        began = time.monotonic()
        model, _ = self._begin(task, packed)
        with self._counted() as report:
            report |= self._heldout(model, site, task)
        return report | {"seconds": time.monotonic() - began}

    def _begin(self, task: Task, packed: bytes) -> tuple[SiteModel, Arrays]:
        """The model with the factors of the message, and these.

        Raises DigestMismatch, InvalidRequest, and DeadlineExceeded for a task that waited too long.
        """
        if task.expires is not None and time.monotonic() > task.expires:
            raise DeadlineExceeded(f"round {task.round} was over before this site had time for it")
        if task.serving_digest != self._manifest.serving_digest:
            mine, theirs = self._manifest.serving_digest[:12], task.serving_digest[:12]
            raise DigestMismatch(f"the site holds the bundle {mine}, the run is about {theirs}")
        if hashlib.sha256(packed).hexdigest() != task.base:
            raise InvalidRequest("the factors were damaged on the way: their digest is another one")
        model = self._prepare(_lora(task.lora), task.gradients)
        base = unpack(packed, shapes_of(self._initial), "fp32")
        load_factors(model.shards, base)
        return model, base

    def _prepare(self, lora: LoraSettings, gradients: CodecName) -> SiteModel:
        """The model with this LoRA: the one at hand, or a new one."""
        if gradients != self._gradients:
            self._core.close()
            self._core, self._gradients = self._connect(gradients), gradients
            if self._model:
                self._model.core = self._core
        if self._model is None or lora != self._lora:
            edge, device = (TorchShard.load(floats) for floats in self._slices)
            for shard in (edge, device):
                add_lora(shard, lora)
            self._model = SiteModel(edge, device, self._core, self._cache(lora))
            self._lora, self._initial = lora, factors(self._model.shards)
        return self._model

    def _cache(self, lora: LoraSettings) -> RowCache | None:
        """Rows are worth keeping where nothing before the device is trained."""
        if "edge" in lora.tiers:
            return None
        serving = self._manifest.serving
        codec = RowCodec(serving.codec, serving.spec.hidden)
        return RowCache(self._state / "rows", codec, self._manifest.serving_digest)

    def _heldout(self, model: SiteModel, site: str, task: Task) -> dict[str, Any]:
        """Mean loss in nats over held-out text, if the task wants it."""
        if not task.evaluate:
            return {}
        batches = self._texts[site].evaluation(task.sequences, task.length, task.evaluate)
        return {"heldout": evaluate(model, batches)}

    @contextmanager
    def _counted(self) -> Iterator[dict[str, Any]]:
        """A report that has the bytes to and from the core at the end."""
        report: dict[str, Any] = {}
        before = {name: int(getattr(self._core.traffic, name)) for name in _TRAFFIC}
        yield report
        report |= {name: int(getattr(self._core.traffic, name)) - before[name] for name in _TRAFFIC}


def _task(request: Record) -> Task:
    try:
        return Task.model_validate({name: value for name, value in request.items() if name != "data"})
    except ValidationError as error:
        problem = error.errors()[0]
        raise InvalidRequest(f"the task's {problem['loc'][0]}: {problem['msg']}") from None


def _lora(text: object) -> LoraSettings:
    return _parsed(LoraSettings, text)


def _settings(text: object) -> TrainSettings:
    return _parsed(TrainSettings, text)


def _parsed(kind: type[T], text: object) -> T:
    """A dataclass from JSON. Raises InvalidRequest."""
    try:
        given = json.loads(str(text))
        unknown = set(given) - {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        if unknown:
            raise InvalidRequest(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
        return TypeAdapter(kind).validate_python(given)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{kind.__name__}: {str(error).splitlines()[0]}") from None


def _seed(seed: int, site: str) -> int:
    """Sites go through their texts in orders of their own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {site}".encode()).digest()[:8], "little")
