"""The engines as `trifold doctor` tries them: of the edge's room, it knows them by entry point only."""

from __future__ import annotations

from trifold.cloud.core.engines.alone import Alone
from trifold.cloud.core.engines.registry import loader
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.settings import CloudSettings, EngineName


def onnxruntime(folder: TierFolder) -> Alone:
    return _alone(folder, "onnxruntime")


def tensorrt(folder: TierFolder) -> Alone:
    return _alone(folder, "tensorrt")


def torch(folder: TierFolder) -> Alone:
    return _alone(folder, "torch")


def _alone(folder: TierFolder, engine: EngineName) -> Alone:
    """With the settings of `trifold cloud serve`, as far as they are this engine's. Raises ConfigError."""
    fields = CloudSettings.model_fields
    others = {} if engine == "torch" else {name: fields[name].default for name in ("device", "weights")}
    settings = CloudSettings.load(None, bundle=folder.path, engine=engine, **others)
    return Alone.loader(loader(settings))(folder)
