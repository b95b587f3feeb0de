"""The manifest of a bundle: what was split, where it was cut, and the hash of every file.

A bundle is one folder per tier (`cloud/`, `edge/`, `device/`), each complete in itself: the same
`manifest.json` lies in all of them beside the tier's own files, so that a device downloads its tenth only.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final, Literal, get_args

from pydantic import Field

from trifold.shared.model.spec import ModelSpec, Part

Tier = Literal["cloud", "edge", "device"]
TIERS: tuple[Tier, ...] = get_args(Tier)

Quantization = Literal["int8", "int4", "none"]
CodecName = Literal["int8", "bf16", "none"]


FLOATS: Final = "float.safetensors"
CONFIG: Final = "config.json"
"""Of a tier's float slice, which training needs."""


class Cuts(Part):
    """Layer boundaries: the edge runs layers [0, edge), the cloud [edge, cloud), the device [cloud, all)."""

    edge: int = Field(ge=0)
    cloud: int = Field(ge=0)

    def layers(self, tier: Tier, count: int) -> range:
        """The layers of a tier in a model of `count`."""
        spans: dict[Tier, range] = {
            "edge": range(self.edge),
            "cloud": range(self.edge, self.cloud),
            "device": range(self.cloud, count),
        }
        return spans[tier]


class FileEntry(Part):
    """One file of a tier: its bytes are known before it is opened."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Serving(Part):
    """Everything that decides which token comes next; its hash is the serving digest."""

    spec: ModelSpec
    cuts: Cuts
    quantization: Quantization
    codec: CodecName
    files: dict[Tier, dict[str, FileEntry]]

    def digest(self) -> str:
        """SHA-256 over canonical JSON, lower-case hex."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class Manifest(Part):
    """`manifest.json`. `serving_digest` is that of `serving`; `training` lists float slices beside it."""

    format: Literal[1] = 1
    producer: str
    serving_digest: str
    serving: Serving
    training: dict[Tier, dict[str, FileEntry]] = Field(default_factory=dict)
