"""Where the frozen core computes: the processor, or a GPU of this machine."""

from __future__ import annotations

import os

import torch

from trifold.shared.errors import ConfigError


def find(name: str) -> torch.device:
    """The device that is called "cpu", "cuda" or "cuda:N". Raises ConfigError when there is none such."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        what = f"--device {name}: torch {torch.__version__} finds no CUDA here"
        raise ConfigError(f"{what}; install a build of torch for your GPU's driver, or take --device cpu")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"--device {name}: this machine has cuda:0 to cuda:{count - 1}")
    # What cuBLAS wants before its first use in order to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """The kind of processor, which decides on the bits of results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()
