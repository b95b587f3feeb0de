"""What the tiers can do: the file that `trifold plan --tiers` reads."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from trifold.cloud.split.quantities import Bytes, BytesPerSecond, PerSecond, Seconds
from trifold.cloud.split.traffic import LinkName
from trifold.shared.bundle.manifest import Tier
from trifold.shared.errors import ConfigError
from trifold.shared.model.spec import Part

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Machine(Part):
    """What a tier computes with: what it reaches in practice, not what its data sheet says."""

    memory: Bytes
    """For weights and KV, such as "16GB"."""
    flops: PerSecond
    """Floating-point operations a second in matrix products, such as 2e12."""
    bandwidth: BytesPerSecond
    """Read from memory, such as "50GB/s"."""


class Link(Part):
    """A connection between two tiers, alike in both directions."""

    bandwidth: BytesPerSecond
    """Carried, such as "100Mbit/s"."""
    rtt: Seconds
    """There and back, such as "20ms"."""


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
        """Read a TOML file. Raises ConfigError naming the file and every key that is missing or wrong."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            problems = map(_problem, error.errors())
            raise ConfigError("\n  ".join([f"{path} does not describe the tiers:", *problems])) from None
        except ValueError as error:
            raise ConfigError(f"{path}: is not TOML: {error}") from error


def _problem(error: ErrorDetails) -> str:
    """One thing that is wrong, in a line."""
    *tables, name = map(str, error["loc"])
    key = ".".join([*tables, name]) if tables else f"[{name}]"
    match error["type"]:
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden":
            known = _keys(tables)
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            return f"{key} is unknown: {hint}"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case _:
            return f"{key} is not a table"


def _keys(tables: list[str]) -> list[str]:
    """What there is to set in a table, or which tables there are."""
    if not tables:
        return list(TierProfiles.model_fields)
    return list((Link if "_" in tables[0] else Machine).model_fields)
