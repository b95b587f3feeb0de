"""FloatSlice: the float weights of one tier, as `split --train` wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load

from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import CONFIG, FLOATS, Cuts, Tier
from trifold.shared.errors import ConfigError
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields
from trifold.shared.model.names import Names
from trifold.shared.model.spec import ModelSpec


class FloatSlice:
    """The float weights of a tier under their names in the checkpoint, and the config of the whole model."""

    def __init__(self, folder: TierFolder, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config: dict[str, Any] = dict(config)
        self.tier: Tier = folder.tier
        self.cuts: Cuts = folder.manifest.serving.cuts
        self.spec: ModelSpec = folder.manifest.serving.spec

    @classmethod
    def open(cls, folder: TierFolder) -> FloatSlice:
        """Raises ConfigError when the bundle was split without --train, DamagedFile for altered files."""
        if FLOATS not in folder.manifest.training.get(folder.tier, {}):
            raise ConfigError(
                f"{folder.path}: the bundle holds no float weights of the {folder.tier} to train with; "
                "make it again with `trifold split --train`"
            )
        return cls(folder, json.loads(folder.read(CONFIG)))

    @cached_property
    def names(self) -> Names:
        """What the checkpoint calls its tensors."""
        family = family_of(Fields(self.config, str(self.folder.path / CONFIG)))
        return Names(self.spec, family.layout())

    @property
    def layers(self) -> range:
        """The layers of the tier, as numbered in the checkpoint."""
        return self.cuts.layers(self.tier, len(self.spec.layers))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights by checkpoint name, in the dtype of the slice. Raises DamagedFile for altered files."""
        return load(self.folder.read(FLOATS))
