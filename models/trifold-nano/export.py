"""Write model.safetensors from a checkpoint and prove it: python export.py --work DIR.

Weights go out as bf16 under the names of the Hub layout (one tensor per expert and projection); the routing
bias stays fp32.  Then the directory is loaded with transformers, compared with model.py in fp32, and its loss
measured on heldout.txt.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from config import Config
from model import Model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


def hub_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts [E, 2I, D] and [E, D, I] to one entry per expert and projection."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("e_score_correction_bias"):
            out[name] = value.float().clone()
        elif name.endswith("experts.gate_up_proj"):
            for e, pair in enumerate(value):
                for kind, part in zip(("gate_proj", "up_proj"), pair.chunk(2), strict=True):
                    out[name.replace("gate_up_proj", f"{e}.{kind}.weight")] = part.bfloat16().contiguous()
        elif name.endswith("experts.down_proj"):
            for e, part in enumerate(value):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = part.bfloat16().contiguous()
        else:
            out[name] = value.bfloat16().contiguous()
    return out


def memory_layout(state: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The inverse of ``hub_layout``, in fp32, for model.py."""
    out = {name: value.float() for name, value in state.items() if ".experts." not in name}
    prefixes = {name.split(".experts.")[0] + ".experts." for name in state if ".experts." in name}
    for prefix in prefixes:
        parts = {
            kind: torch.stack([state[f"{prefix}{e}.{kind}.weight"].float() for e in range(experts)])
            for kind in ("gate_proj", "up_proj", "down_proj")
        }
        out[prefix + "gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), 1)
        out[prefix + "down_proj"] = parts["down_proj"]
    return out


@torch.no_grad()
def difference(config: Config, tokens: Tensor) -> float:
    """Largest difference of the logits of model.py and transformers in fp32, over the largest logit."""
    ours = Model(config, torch.float32)
    state = load_file(HERE / "model.safetensors")
    ours.load_state_dict(memory_layout(state, config.n_routed_experts))
    theirs = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32)
    expected = theirs(tokens).logits
    return float((ours(tokens) - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def heldout(dtype: torch.dtype, window: int) -> dict[str, float]:
    """Loss on heldout.txt through transformers, in windows of the token stream."""
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=dtype)
    documents = (HERE / "heldout.txt").read_text().split("<|endoftext|>\n")
    parts = [[*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id] for text in documents]
    ids = torch.tensor([token for part in parts for token in part])
    size = sum(len(text.encode()) for text in documents)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window + 1]
        logits = model(piece[None, :-1]).logits[0].float()
        total += float(functional.cross_entropy(logits, piece[1:], reduction="sum"))
        count += len(piece) - 1
    loss = total / count
    return {
        "tokens": count,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": total / math.log(2) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    save_file(hub_layout(state["model"]), HERE / "model.safetensors", {"format": "pt"})
    (HERE / "model.safetensors").chmod(0o644)
    config = Config.load(HERE / "config.json")
    tokens = torch.randint(0, config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    sizes = {name: value.numel() for name, value in state["model"].items() if "bias" not in name}
    total = sum(sizes.values())
    dense = tuple(f".layers.{i}." for i in range(config.first_k_dense_replace))
    edge = sum(n for name, n in sizes.items() if "embed" in name or any(d in name for d in dense))
    device = sum(n for name, n in sizes.items() if name in ("lm_head.weight", "model.norm.weight"))
    report = {
        "step": state["step"],
        "parameters": total,
        "shares": {"edge": edge / total, "cloud": (total - edge - device) / total, "device": device / total},
        "file_bytes": (HERE / "model.safetensors").stat().st_size,
        "difference_fp32": difference(config, tokens),
        "heldout_bf16_1024": heldout(torch.bfloat16, 1024),
        "heldout_bf16_512": heldout(torch.bfloat16, 512),
        "heldout_fp32_512": heldout(torch.float32, 512),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
