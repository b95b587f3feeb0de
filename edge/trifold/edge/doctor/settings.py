"""What `trifold doctor` is told: the settings of `trifold edge serve`, none of which has to be given."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from trifold.edge.doctor.patient import Patient
from trifold.shared.settings import Address, EdgeSettings


class DoctorSettings(EdgeSettings):
    """Those of the edge: its section of the TOML file and its variables count here, too."""

    positional: ClassVar[str] = ""

    bundle: Path = Field(Path("bundle"), description="Folder of a bundle, or of a tier's part of it.")
    core: Address = Field("127.0.0.1:50060", description="HOST:PORT of the cloud.")

    @classmethod
    def default_of(cls, name: str) -> str:
        return "not looked at" if name in ("bundle", "core", "tls") else super().default_of(name)

    def patient(self) -> Patient:
        """What was given; what was not stays out of the examination."""
        given = self.model_fields_set
        return Patient(
            bundle=self.bundle if "bundle" in given else None,
            core=self.core if "core" in given else None,
            tls=self.tls,
            insecure=self.insecure,
            threads=self.threads,
            timeout=self.timeout,
            kv_memory=self.kv_memory,
        )
