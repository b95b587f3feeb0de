"""What the tiers can do: the file that `trifold plan --tiers` reads."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import ByteSize, Field, ValidationError

from trifold.cloud.split.traffic import LinkName
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import ConfigError
from trifold.shared.model.spec import Part


class Machine(Part):
    """What a tier computes with: what it reaches in practice, not what its data sheet says."""

    memory: ByteSize = Field(gt=0)
    """For weights and KV, such as "16GB"."""
    flops: float = Field(gt=0)
    """Floating-point operations a second in matrix products, such as 2e12."""
    bandwidth: ByteSize = Field(gt=0)
    """Read from memory in a second, such as "50GB"."""


class Link(Part):
    """A connection between two tiers, alike in both directions."""

    bandwidth: ByteSize = Field(gt=0)
    """Carried in a second, such as "100Mbit"."""
    rtt: float = Field(ge=0)
    """Seconds there and back."""


class TierProfiles(Part):
    """Three machines and two links: the tables of the TOML file."""

    cloud: Machine
    edge: Machine
    device: Machine
    device_edge: Link
    edge_cloud: Link

    def machine(self, tier: Tier) -> Machine:
        return {"cloud": self.cloud, "edge": self.edge, "device": self.device}[tier]

    def link(self, name: LinkName) -> Link:
        return {"device_edge": self.device_edge, "edge_cloud": self.edge_cloud}[name]

    @classmethod
    def load(cls, path: Path) -> TierProfiles:
        """Read a TOML file. Raises ConfigError naming the file and the key that is missing or wrong."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{path}: {key}: {first['msg']}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: is not TOML: {error}") from error
