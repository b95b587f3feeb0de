"""Adapter: a version of a tier's weights that fine-tuning has made, beside those of the bundle.

    <tier>/adapters/<digest>/adapter.json   what it is, and the files in which it differs from the tier's own
                             weights.bin    with the LoRA factors merged in

Versions lie outside the serving digest: the core knows nothing of them, edge and device hold the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import AwareDatetime, Field, ValidationError

from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import FileEntry, Tier
from trifold.shared.errors import DamagedFile, DigestMismatch
from trifold.shared.model.spec import Part

ADAPTED: Final[tuple[Tier, ...]] = ("edge", "device")
"""The tiers that have versions. Requests come from the device, so the edge is always told first."""

ADAPTER: Final = "adapter.json"

_DIGEST: Final = "^[0-9a-f]{64}$"
_REMEDY: Final = "add the version again from its factors, or copy its folder from where it was built"


class Origin(Part):
    """Where a version comes from; outside its digest. `parent` is the version that was in force before."""

    producer: str
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    run: str = ""
    round: int | None = Field(None, ge=0)
    parent: str = ""


class Adapter(Part):
    """`adapter.json` of one tier. `files` replace those of the tier; it may be none of them.

    `digest` is over bundle and factors, so that edge and device can be built apart.
    """

    format: Literal[1] = 1
    digest: str = Field(pattern=_DIGEST)
    serving_digest: str = Field(pattern=_DIGEST)
    factors_digest: str = Field(pattern=_DIGEST)
    files: dict[str, FileEntry]
    origin: Origin


def adapter_digest(serving_digest: str, factors_digest: str) -> str:
    """SHA-256 over canonical JSON, lower-case hex."""
    content = {"serving_digest": serving_digest, "factors_digest": factors_digest}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class AdaptedFolder(TierFolder):
    """A tier's folder, but for the files of an adapter version; every byte is checked like the others."""

    _listing = ADAPTER
    _remedy = _REMEDY

    def __init__(self, base: TierFolder, path: Path) -> None:
        """The version in the folder `path`, which is called like its digest.

        Raises DamagedFile naming the file that is missing, linked, of a wrong size or not what it should be,
        DigestMismatch when the version is another bundle's.
        """
        super().__init__(path, base.tier, base.manifest)
        self.adapter = _adapter(path)
        self._base = base
        self._listed = self.adapter.files
        theirs, ours = self.adapter.serving_digest, base.manifest.serving_digest
        if theirs != ours:
            what = f"{path}: was made for bundle {theirs[:12]}, this is {ours[:12]}"
            raise DigestMismatch(f"{what}: build it again from its factors")
        for name, entry in self.adapter.files.items():
            os.close(self._open(name, entry))

    def read(self, name: str) -> bytes:
        """The bytes of a file of this version. Raises DamagedFile when they are not those of adapter.json."""
        return super().read(name) if name in self.adapter.files else self._base.read(name)

    @contextmanager
    def mapped(self, name: str, progress: Progress = lambda done, total: None) -> Iterator[memoryview]:
        """As read()."""
        mapped = super().mapped if name in self.adapter.files else self._base.mapped
        with mapped(name, progress) as data:
            yield data


def _adapter(path: Path) -> Adapter:
    try:
        adapter = Adapter.model_validate_json((path / ADAPTER).read_bytes())
    except OSError as error:
        raise DamagedFile(f"{path / ADAPTER}: cannot be read: {error.strerror}; {_REMEDY}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedFile(f"{path / ADAPTER}: {where or 'the file'}: {first['msg']}; {_REMEDY}") from error
    if not adapter.digest == path.name == adapter_digest(adapter.serving_digest, adapter.factors_digest):
        raise DamagedFile(f"{path / ADAPTER}: the digest is not that of the contents; {_REMEDY}")
    return adapter
