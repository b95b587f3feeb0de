"""The float weights of a core, as `split --train` wrote them, for whoever builds a graph. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trifold.cloud.split.graph.matrix import Source
from trifold.shared.bundle.folder import REMEDY, TierFolder
from trifold.shared.bundle.manifest import CONFIG, FLOATS
from trifold.shared.errors import ConfigError, DamagedFile
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.fields import Fields
from trifold.shared.model.safetensors import SafetensorsFile


@contextmanager
def float_source(folder: TierFolder) -> Iterator[Source]:
    """The tensors of the tier, read from the mapped file, every byte of which was hashed before.

    Raises ConfigError when the bundle was split without --train, DamagedFile for altered files.
    """
    check_floats(folder)
    path, entry = folder.path / FLOATS, folder.manifest.training[folder.tier][FLOATS]
    config = Fields(json.loads(folder.read(CONFIG)), str(folder.path / CONFIG))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror}; {REMEDY}") from error
    with os.fdopen(descriptor, "rb") as file:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not regular or hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise DamagedFile(f"{path}: the contents are not those of the manifest; {REMEDY}")
        # By its descriptor: what is mapped is what was hashed, whatever the name stands for by now.
        mapped = SafetensorsFile(Path(f"/proc/self/fd/{descriptor}"))
        yield Source(Checkpoint(folder.path, config, dict.fromkeys(mapped.entries, mapped)))


def check_floats(folder: TierFolder) -> None:
    """Raises ConfigError when the bundle was split without --train."""
    if FLOATS not in folder.manifest.training.get(folder.tier, {}):
        raise ConfigError(
            f"{folder.path}: the bundle holds no float weights of the {folder.tier}, which the engine "
            "tensorrt is built from; make it again with `trifold split --train`"
        )
