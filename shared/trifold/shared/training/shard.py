"""TorchShard: the layers of one tier as transformers' own modules, differentiable."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModel

from trifold.shared.bundle.manifest import Tier
from trifold.shared.model.spec import DenseFfn
from trifold.shared.training.slices import FloatSlice
from trifold.shared.training.weights import Weights
from trifold.shared.training.wire import Batch

_NOISE: Final = ("attention_dropout", "router_jitter_noise")
_MAIN_MEMORY: Final = torch.device("cpu")


class TorchShard(nn.Module):
    """Embedding and layers on the edge, layers in the cloud, layers, norm and head on the device.

    All weights are frozen; `add_lora` brings the parameters that are trained. There is no dropout and no
    other noise, so that a step computed twice gives the same bits. The inputs may lie on another torch device
    than the shard, and have another dtype.
    """

    def __init__(
        self, model: Any, head: nn.Module | None, tier: Tier, first: int, dtype: torch.dtype
    ) -> None:
        """Of `model`, transformers' model without a head, whose layers begin at the checkpoint's `first`."""
        super().__init__()
        self.model = model
        self.head = head
        self.tier: Tier = tier
        self._first = first
        self._dtype = dtype

    @classmethod
    def load(
        cls,
        floats: FloatSlice,
        dtype: torch.dtype = torch.float32,
        device: torch.device = _MAIN_MEMORY,
    ) -> Self:
        """Make the shard of a slice, its weights in `dtype` on `device`.

        From then on torch takes deterministic algorithms where it has them: on several threads, gradients of
        experts are otherwise summed up in an order that changes from one time to the next.

        Raises UnsupportedModel where transformers wants other tensors than the slice holds.
        """
        torch.use_deterministic_algorithms(True, warn_only=True)
        with torch.device("meta"):
            shard = cls._blank(floats, dtype)
        weights = Weights(floats, dtype, device)
        state = {name: weights.take(shard.checkpoint_name(name)) for name in shard.state_dict()}
        weights.check_empty()
        shard.load_state_dict(state, assign=True)
        # Its frequencies are no weights: they come from the config, and not from the meta device.
        shard.model.rotary_emb = type(shard.model.rotary_emb)(shard.model.config).to(device)
        shard.train(False)
        for layer in shard.model.layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        return shard.requires_grad_(False)

    @classmethod
    def _blank(cls, floats: FloatSlice, dtype: torch.dtype) -> Self:
        """The shard without weights: transformers' whole model, cut."""
        config = _config(floats)
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")  # type: ignore[no-untyped-call]
        head = None
        for layer, spec in zip(model.layers, floats.spec.layers, strict=True):
            if isinstance(spec.ffn, DenseFfn) and hasattr(layer.mlp, "experts"):
                # moe_layer_freq, a key that DeepSeek's own code knows and transformers does not.
                layer.mlp = type(layer.mlp.shared_experts)(config)
        model.layers = model.layers[floats.layers.start : floats.layers.stop]
        if floats.tier != "edge":
            model.embed_tokens = None
        if floats.tier == "device":
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        else:
            model.norm = nn.Identity()
        return cls(model, head, floats.tier, floats.layers.start, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute sequences that begin at position 0, each row attending to those before it.

        `inputs` are token ids (sequences, length) on the edge, rows (sequences, length, hidden) elsewhere;
        the result is rows (sequences, length, hidden), logits (sequences, length, vocab) from the device.
        """
        if self.tier == "edge":
            found = self.model(input_ids=inputs.to(self.device), use_cache=False)
        else:
            found = self.model(inputs_embeds=inputs.to(self.device, self._dtype), use_cache=False)
        rows: torch.Tensor = found.last_hidden_state
        return rows if self.head is None else self.head(rows)

    @property
    def device(self) -> torch.device:
        """Where the shard computes."""
        where: torch.device = self.model.rotary_emb.inv_freq.device
        return where

    @property
    def checkpointing(self) -> bool:
        """Whether layers keep no activations but their inputs, and compute the others again on the way back
        (arXiv 1604.06174). The gradients are the same to the last bit. Holds for what goes forward next.
        """
        return any(layer.gradient_checkpointing for layer in self.model.layers)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        for layer in self.model.layers:
            # transformers looks at both; the parts of a layer, which could make noise, stay as they are.
            layer.gradient_checkpointing = layer.training = on

    def checkpoint_name(self, name: str) -> str:
        """By the name of a module or tensor in this shard, the one in transformers' model of the checkpoint.

        So "model.layers.0.self_attn.q_proj" of a shard from layer 7 on is "model.layers.7.self_attn.q_proj".
        """
        if name.startswith("head."):
            return f"lm_{name}"
        if not name.startswith("model.layers."):
            return name
        model, layers, index, rest = name.split(".", 3)
        return f"{model}.{layers}.{int(index) + self._first}.{rest}"


def batch_of(rows: torch.Tensor) -> Batch:
    """Rows or gradients as they cross a cut: in fp32 and main memory, whatever they were computed in."""
    array: Batch = rows.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def _config(floats: FloatSlice) -> Any:
    """transformers' config of the whole model."""
    values = {name: value for name, value in floats.config.items() if name != "quantization_config"}
    config = CONFIG_MAPPING[floats.spec.family].from_dict(values)
    for noise in _NOISE:
        if hasattr(config, noise):
            setattr(config, noise, 0.0)
    return config
