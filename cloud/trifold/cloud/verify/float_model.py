"""The float model that a bundle was made from, run by transformers: the reference for fidelity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.errors import UnsupportedModel


class FloatModel:
    """A checkpoint in fp32 on the CPU."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    @classmethod
    def load(cls, checkpoint: Path) -> Self:
        """Raises UnsupportedModel when transformers cannot load the checkpoint."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=torch.float32, attn_implementation="eager"
            )
        except (OSError, ValueError, ImportError) as error:
            raise UnsupportedModel(f"transformers cannot load {checkpoint}: {error}") from error
        return cls(model.train(False))

    @torch.no_grad()
    def merge(self, factors: LoraFactors) -> None:
        """Adds the updates of LoRA factors to the weights they name."""
        for weight in factors.shapes():
            parameter = self._model.get_parameter(weight)
            parameter.copy_(torch.from_numpy(factors.merged(weight, parameter.numpy())))

    @torch.inference_mode()
    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """The logits (n, vocab) of a sequence of token ids (n,) that begins at position 0."""
        logits: torch.Tensor = self._model(torch.from_numpy(tokens)[None]).logits[0]
        return logits.float().numpy()
