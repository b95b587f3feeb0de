"""The float weights of a core, as `split --train` wrote them, for whoever builds a graph. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from trifold.cloud.split.graph.matrix import Source
from trifold.shared.bundle.folder import Progress, TierFolder
from trifold.shared.bundle.manifest import CONFIG, FLOATS
from trifold.shared.errors import ConfigError
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.fields import Fields
from trifold.shared.model.safetensors import SafetensorsFile


@contextmanager
def float_source(folder: TierFolder, progress: Progress = lambda done, total: None) -> Iterator[Source]:
    """The tensors of the tier, read from the mapped file; `progress` hears how many bytes have been checked.

    Raises ConfigError for a bundle split without --train, DamagedFile for altered files, on leaving, too.
    """
    check_floats(folder)
    config = Fields(json.loads(folder.read(CONFIG)), str(folder.path / CONFIG))
    with folder.mapped(FLOATS, progress):
        file = SafetensorsFile(folder.path / FLOATS)
        yield Source(Checkpoint(folder.path, config, dict.fromkeys(file.entries, file)))


def check_floats(folder: TierFolder) -> None:
    """Raises ConfigError when the bundle was split without --train."""
    if FLOATS not in folder.manifest.training.get(folder.tier, {}):
        raise ConfigError(
            f"{folder.path}: the bundle holds no float weights of the {folder.tier}, which the engine "
            "tensorrt is built from; make it again with `trifold split --train`"
        )
