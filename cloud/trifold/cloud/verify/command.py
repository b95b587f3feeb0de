"""`trifold verify`: how much quality a bundle costs against the float model, and what costs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from trifold.cloud.core.engines.alone import Alone
from trifold.cloud.core.engines.registry import loader
from trifold.cloud.verify.fidelity import Fidelity
from trifold.shared.bundle.adapter import adapter_digest
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.store import BASE
from trifold.shared.errors import ConfigError, DamagedFile, InvalidRequest
from trifold.shared.runtime.codec import RowCodec
from trifold.shared.runtime.monolith import Monolith
from trifold.shared.settings import CloudSettings

if TYPE_CHECKING:
    from trifold.cloud.verify.float_model import FloatModel

HELD_OUT = "heldout.txt"


@dataclass(frozen=True)
class Verdict:
    """The float model, the bundle's weights without the wire codec, and the bundle as it is served."""

    float_model: Fidelity
    weights: Fidelity
    split: Fidelity

    def as_dict(self) -> dict[str, float]:
        return {
            "tokens": self.split.tokens,
            "perplexity_float": self.float_model.perplexity,
            "perplexity_weights": self.weights.perplexity,
            "perplexity_split": self.split.perplexity,
            "perplexity_increase": self.split.perplexity / self.float_model.perplexity - 1,
            "loss_from_weights": self.weights.loss - self.float_model.loss,
            "loss_from_wire": self.split.loss - self.weights.loss,
            "kl_weights": self.weights.kl,
            "kl_split": self.split.kl,
            "agreement_weights": self.weights.agreement,
            "agreement_split": self.split.agreement,
        }

    def table(self) -> Table:
        table = Table(title=f"{self.split.tokens:,} tokens of held-out text", title_justify="left")
        for heading in ("", "perplexity", "vs float", "loss added", "KL", "top-1"):
            table.add_column(heading, justify="left" if not heading else "right")
        rows = {
            "float": (self.float_model, None),
            "+ weights": (self.weights, self.float_model),
            "+ wire": (self.split, self.weights),
        }
        for name, (model, before) in rows.items():
            cells = [name, f"{model.perplexity:.4f}"]
            if before:
                increase = model.perplexity / self.float_model.perplexity - 1
                added = f"{model.loss - before.loss:+.2e}"
                cells += [f"{increase:+.3%}", added, f"{model.kl:.2e}", f"{model.agreement:.2%}"]
            table.add_row(*cells)
        return table


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, all three tiers.")],
    against: Annotated[Path, typer.Option(help="Folder of the checkpoint it was split from.")],
    factors: Annotated[
        Path | None,
        typer.Option(help="LoRA factors: compare their adapter version with the model that has them merged."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help=f"Held-out text; without it the checkpoint's own {HELD_OUT}.")
    ] = None,
    engine: Annotated[str | None, CloudSettings.flag("engine")] = None,
    device: Annotated[str | None, CloudSettings.flag("device")] = None,
    weights: Annotated[str | None, CloudSettings.flag("weights")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are predicted from one start.")] = 512,
    tokens: Annotated[int, typer.Option(min=0, help="Stop after so many; 0 takes the whole text.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement of a bundle against the float model.

    The core runs on the engine that `trifold cloud serve` would serve it with.
    """
    load_float_model = _float_model()
    settings = CloudSettings.load(None, bundle=bundle, engine=engine, device=device, weights=weights)
    core = Alone.loader(loader(settings))
    lora = LoraFactors.load(factors) if factors else None
    monolith = Monolith.load(
        bundle,
        adapter=_adapter(bundle, lora) if lora else BASE,
        core=core,
    )
    ids = _tokenize(bundle, text or against / HELD_OUT)[: tokens or None]
    window = min(window, monolith.edge.spec.max_positions)
    windows = list(_windows(ids, window))
    if not windows:
        raise InvalidRequest(f"the text has {len(ids)} tokens: two or more are needed to predict one")
    console = Console(stderr=True)
    model = load_float_model(against)
    if lora:
        model.merge(lora)
    verdict = compare(model, monolith, track(windows, "Verifying", console=console))
    if as_json:
        print(json.dumps(verdict.as_dict(), indent=2))
    else:
        Console().print(verdict.table())


def compare(model: FloatModel, monolith: Monolith, windows: Iterable[NDArray[np.int64]]) -> Verdict:
    """Runs every window (n,) through the float model, the bundle without its codec, and the bundle."""
    verdict = Verdict(Fidelity(), Fidelity(), Fidelity())
    served, plain = monolith.codec, RowCodec("none", monolith.edge.hidden)
    for window in windows:
        targets = window[1:]
        reference = model.logits(window[:-1])
        verdict.float_model.add(reference, reference, targets)
        for codec, fidelity in ((plain, verdict.weights), (served, verdict.split)):
            monolith.codec = codec
            logits = monolith.session(len(window)).feed(window[:-1], 0)
            fidelity.add(logits, reference, targets)
    return verdict


def _float_model() -> Callable[[Path], FloatModel]:
    """What loads the float model. Raises ConfigError where the extra that brings torch is not installed."""
    try:
        from trifold.cloud.verify.float_model import FloatModel
    except ModuleNotFoundError as error:
        needed = f"trifold verify needs the package {error.name}"
        raise ConfigError(f"{needed}: install Trifold with the extra 'verify'") from None
    return FloatModel.load


def _adapter(bundle: Path, factors: LoraFactors) -> str:
    """The digest of the version that `trifold adapter add` makes of these factors."""
    return adapter_digest(TierFolder.open(bundle, "edge").manifest.serving_digest, factors.digest())


def _windows(ids: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Windows of at most `size` tokens that overlap by one: every token but the first is predicted once."""
    for start in range(0, len(ids) - 1, size - 1):
        yield ids[start : start + size]


def _tokenize(bundle: Path, text: Path) -> NDArray[np.int64]:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFile(
            f"{text} cannot be read as text ({error}): give held-out text with --text"
        ) from None
    tokenizer = Tokenizer.from_file(str(bundle / "device" / "tokenizer.json"))
    return np.array(tokenizer.encode(content, add_special_tokens=False).ids, np.int64)
