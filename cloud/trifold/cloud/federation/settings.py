"""What a federated run is told: one table, read from TOML and from `--set NAME=VALUE`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trifold.shared.bundle.manifest import CodecName
from trifold.shared.errors import ConfigError
from trifold.shared.federation.packing import Kind

StrategyName = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedmedian", "trimmed-mean", "krum"
]
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)

Aggregation = Literal["mean", "svd"]


class Lora(BaseModel):
    """The adapter that is trained; as LoraSettings of the training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(8, ge=1, le=1024, description="Rank of the adapter.")
    alpha: float = Field(16.0, gt=0, description="Its scale: W + alpha / rank * B A.")
    seed: int = Field(0, ge=0, description="From which A is drawn.")
    tiers: tuple[Literal["edge", "device"], ...] = Field(
        ("edge", "device"), min_length=1, description="Whose layers are trained."
    )
    freeze_a: bool = Field(False, description="Train B alone, so that the mean of updates is exact.")


class Local(BaseModel):
    """What a site does in a round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(20, ge=1, description="Optimizer steps of a site in a round.")
    sequences: int = Field(8, ge=1, description="Sequences in a batch.")
    length: int = Field(128, ge=2, description="Tokens in a sequence.")
    learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate.")
    warmup: int = Field(0, ge=0, description="Steps, of all rounds together, over which it is reached.")
    accumulate: int = Field(1, ge=1, description="Batches in a step.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    clip: float = Field(1.0, gt=0, description="Most norm of a gradient.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of the site's computing.")
    checkpointing: bool = Field(
        False, description="Compute a site's activations again instead of keeping them."
    )
    gradients: CodecName = Field("int8", description="What gradients of rows travel as.")
    evaluate: int = Field(16, ge=0, description="Batches of held-out text that a site evaluates in a round.")


class RunSettings(BaseModel):
    """`trifold federate run`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = Field(10, ge=1, description="Rounds in all.")
    strategy: StrategyName = Field("fedavg", description="Flower's strategy.")
    options: dict[str, float] = Field(
        default_factory=dict, description="Its own parameters by Flower's names: proximal_mu, eta, beta …"
    )
    aggregation: Aggregation = Field("mean", description="How factors are averaged; see docs/decisions.")
    update: Kind = Field("int8", description="What updates travel as.")
    sites: int = Field(2, ge=1, description="Sites that are waited for at first.")
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the sites that a round asks.")
    quorum: int = Field(1, ge=1, description="Updates without which a round does not count.")
    deadline: float = Field(600.0, gt=0, description="Seconds after which a round goes on with its quorum.")
    attempts: int = Field(3, ge=1, description="How often a round that missed its quorum is tried.")
    norm_ratio: float = Field(10.0, gt=1, description="Most norm of an update, in medians of the others'.")
    norm_bound: float = Field(1e4, gt=0, description="Most norm of an update in any case.")
    seed: int = Field(0, ge=0, description="For sampling sites and for the order of the text.")
    lora: Lora = Lora()
    local: Local = Local()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.aggregation == "svd" and self.strategy not in ("fedavg", "fedprox"):
            raise ValueError(f"aggregation svd is a mean of products: the strategy {self.strategy} has none")
        if self.aggregation == "svd" and self.lora.freeze_a:
            raise ValueError("with lora.freeze_a the mean is exact already: aggregation svd would undo it")
        if self.quorum > self.sites:
            raise ValueError(f"a quorum of {self.quorum} is more than the {self.sites} sites to wait for")
        return self

    @classmethod
    def read(cls, file: Path | None, assignments: Sequence[str] = ()) -> Self:
        """The settings of a TOML file, and over them assignments such as `rounds=20` or `local.steps=50`.

        Raises ConfigError naming what is wrong.
        """
        try:
            given = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{file} is not TOML: {error}") from None
        for assignment in assignments:
            name, equals, value = assignment.partition("=")
            if not equals:
                raise ConfigError(f"--set {assignment}: write NAME=VALUE")
            *sections, last = name.strip().split(".")
            target = given
            for section in sections:
                target = target.setdefault(section, {})
                if not isinstance(target, dict):
                    raise ConfigError(f"--set {assignment}: {section} is set to {target!r} and is no table")
            target[last] = _value(value.strip())
        return cls.checked(given)

    @classmethod
    def checked(cls, given: object) -> Self:
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{name}: {message}" if name else message) from None


def _value(text: str) -> object:
    """A value as TOML has it; a bare word is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
