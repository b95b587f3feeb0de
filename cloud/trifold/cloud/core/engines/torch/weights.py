"""The layers of the core from the float slice of a bundle, tensor by tensor onto the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Final

import torch
from torch import Tensor

from trifold.cloud.core.engines.torch.builder import Builder
from trifold.cloud.core.engines.torch.layers import Core
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import CONFIG, FLOATS
from trifold.shared.errors import ConfigError, DamagedFile
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields
from trifold.shared.model.names import Names
from trifold.shared.model.safetensors import Entry, SafetensorsFile
from trifold.shared.settings import WeightFormat

Tell = Callable[[str], None]

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PATIENCE: Final = 5.0
"""Seconds from one word of progress to the next."""


def load_core(folder: TierFolder, weights: WeightFormat, device: torch.device, tell: Tell) -> Core:
    """The core of a folder, its weights on `device` in the format wanted.

    Main memory holds two tensors of the file at a time, besides what is on the device. `tell` hears every few
    seconds how far it is. Raises ConfigError where the bundle was split without --train, DamagedFile.
    """
    if FLOATS not in folder.manifest.training.get(folder.tier, {}):
        raise ConfigError(
            f"{folder.path}: the bundle holds no float weights of the {folder.tier}, which --engine torch "
            "computes with; make it again with `trifold split --train`, or take --engine onnxruntime"
        )
    spec = folder.manifest.serving.spec
    config = Fields(json.loads(folder.read(CONFIG)), str(folder.path / CONFIG))
    builder = Builder(Names(spec, family_of(config).layout()), weights, device)
    core = builder.core(folder.manifest.serving.cuts.layers(folder.tier, len(spec.layers)))
    for name, values in _tensors(folder, tell):
        if name not in builder.puts:
            raise DamagedFile(
                f"{folder.path / FLOATS}: {name} has no place in a {spec.family} of these layers"
            )
        builder.puts.pop(name)(values)
    if builder.puts:
        raise DamagedFile(f"{folder.path / FLOATS}: {min(builder.puts)} is missing")
    return core


def _tensors(folder: TierFolder, tell: Tell) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor in order of the file; good until the next but one is asked for.

    While one is used the next is read.
    """
    entries = SafetensorsFile(folder.path / FLOATS).entries
    ordered = sorted(entries.items(), key=lambda item: item[1].start)
    if not ordered:
        return
    largest = max(entry.stop - entry.start for entry in entries.values())
    buffers = [
        torch.empty(largest, dtype=torch.uint8, pin_memory=torch.cuda.is_available()) for _ in range(2)
    ]
    size = ordered[-1][1].stop
    with folder.stream(FLOATS) as fill, ThreadPoolExecutor(1) as reader:

        def read(number: int) -> Tensor:
            entry = ordered[number][1]
            data = buffers[number % 2][: entry.stop - entry.start]
            fill(data.numpy().data)
            return _as_tensor(data, entry, str(folder.path / FLOATS))

        fill(memoryview(bytearray(ordered[0][1].start)))
        coming = reader.submit(read, 0)
        told = monotonic()
        for number, (name, entry) in enumerate(ordered):
            values = coming.result()
            if number + 1 < len(ordered):
                coming = reader.submit(read, number + 1)
            yield name, values
            if monotonic() - told > _PATIENCE:
                told = monotonic()
                tell(f"{entry.stop / 1e9:.1f} of {size / 1e9:.1f} GB of weights are loaded")


def _as_tensor(data: Tensor, entry: Entry, path: str) -> Tensor:
    if entry.dtype not in _DTYPES:
        raise DamagedFile(f"{path}: a tensor of {entry.dtype} in a float slice")
    return data.view(_DTYPES[entry.dtype]).view(entry.shape)
