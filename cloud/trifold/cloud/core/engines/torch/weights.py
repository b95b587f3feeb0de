"""The layers of the core from the float slice of a bundle, tensor by tensor onto the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from trifold.cloud.core.engines.torch.builder import Builder
from trifold.cloud.core.engines.torch.layers import Core
from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import CONFIG, FLOATS
from trifold.shared.errors import ConfigError, DamagedFile
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields
from trifold.shared.model.names import Names
from trifold.shared.model.safetensors import SafetensorsFile
from trifold.shared.settings import WeightFormat

_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_core(folder: TierFolder, weights: WeightFormat, device: torch.device, progress: Progress) -> Core:
    """The core of a folder, its weights on `device` in the format wanted.

    Main memory holds one tensor of the file at a time, besides what is on the device. `progress` hears of the
    bytes that have been checked, and then of those that have been loaded. Raises ConfigError where the bundle
    was split without --train, DamagedFile.
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
    for name, values in _tensors(folder, progress):
        if name not in builder.puts:
            raise DamagedFile(
                f"{folder.path / FLOATS}: {name} has no place in a {spec.family} of these layers"
            )
        builder.puts.pop(name)(values)
    if builder.puts:
        raise DamagedFile(f"{folder.path / FLOATS}: {min(builder.puts)} is missing")
    return core


def _tensors(folder: TierFolder, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor in order of the file, good until the next is asked for."""
    path = folder.path / FLOATS
    with folder.mapped(FLOATS, progress) as data:
        entries = SafetensorsFile(path).entries
        largest = max((entry.stop - entry.start for entry in entries.values()), default=0)
        # Pinned, so that a GPU fetches it at full speed.
        buffer = torch.empty(largest, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.dtype not in _DTYPES:
                raise DamagedFile(f"{path}: {name} is {entry.dtype}, which no float slice has")
            part = buffer[: entry.stop - entry.start]
            part.numpy()[:] = np.frombuffer(data[entry.start : entry.stop], np.uint8)
            yield name, part.view(_DTYPES[entry.dtype]).view(entry.shape)
            progress(entry.stop, len(data))
