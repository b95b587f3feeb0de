"""Checkpoint: a Hugging Face folder, opened lazily and checked whole before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import DamagedFile, UnsupportedModel
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields, read_json
from trifold.shared.model.names import Names
from trifold.shared.model.safetensors import DTYPES, SafetensorsFile
from trifold.shared.model.shapes import tensor_shapes

Float = NDArray[np.float32]

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_SCALES: Final = "_scale_inv"


class Checkpoint:
    """Weights and description of a model. `names` says what its tensors are called, `config` is config.json.

    Tensors are read from mapped files one at a time, so that memory holds no more than one of them.
    """

    def __init__(self, path: Path, config: Fields, files: dict[str, SafetensorsFile]) -> None:
        family = family_of(config)
        self.path = path
        self.config: dict[str, Any] = dict(config.values)
        self.spec = family.spec()
        self.names = Names(self.spec, family.layout())
        self._files = files
        self._block = family.weight_block()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open the folder and check, from headers alone, that every tensor is there in the right shape.

        Raises DamagedFile naming file and tensor when something is missing, cut short or of a wrong shape,
        and UnsupportedModel naming what Trifold does not do.
        """
        config = Fields.load(path)
        family_of(config).spec()  # refuses what nobody can split, before the shards are looked at
        checkpoint = cls(path, config, _open_files(path))
        checkpoint._check()
        return checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].entries[name].shape

    def read(self, name: str) -> Float:
        """One tensor in fp32."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Float:
        """Rows [start, stop) of the first axis in fp32; fp8 comes multiplied by the scales of its blocks."""
        values = self._files[name].rows(name, start, stop)
        scales = name + _SCALES
        if scales not in self:
            return values
        height, width = self._block
        first = start // height
        of_blocks = self._files[scales].rows(scales, first, -(-stop // height))
        of_rows = of_blocks[np.arange(start, stop) // height - first]
        for column in range(of_rows.shape[1]):
            values[:, column * width : (column + 1) * width] *= of_rows[:, column, None]
        return values

    def _check(self) -> None:
        expected = tensor_shapes(self.names)
        for name, shape in expected.items():
            self._check_tensor(name, shape)
        for name in sorted(self._files.keys() - expected.keys()):
            self._check_extra(name, expected)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self:
            raise DamagedFile(f"{self.path}: tensor {name} is missing, config.json asks for it")
        file = self._files[name]
        entry = file.entries[name]
        if entry.shape != shape:
            found, wanted = list(entry.shape), list(shape)
            raise DamagedFile(f"{file.path}: tensor {name} is {found}, by config.json it must be {wanted}")
        if entry.dtype not in DTYPES:
            raise UnsupportedModel(f"{file.path}: tensor {name} is stored as {entry.dtype}, not supported")
        if entry.dtype == "F8_E4M3":
            self._check_scales(name, shape)

    def _check_scales(self, name: str, shape: tuple[int, ...]) -> None:
        if self.spec.stored != "float8_e4m3fn" or len(shape) != 2:
            raise UnsupportedModel(f"{self._files[name].path}: tensor {name} is fp8, but not in blocks")
        blocks = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        self._check_tensor(name + _SCALES, blocks)

    def _check_extra(self, name: str, expected: dict[str, tuple[int, ...]]) -> None:
        """A tensor without a place in the spec would be a part of the model that nobody computes."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        past_the_end = layer is not None and int(layer[1]) >= len(self.spec.layers)
        if past_the_end and self.spec.family == "deepseek_v3":
            return  # multi-token prediction
        if name.endswith("rotary_emb.inv_freq") or name.removesuffix(_SCALES) in expected:
            return
        if name == "lm_head.weight" and self.spec.tied_head:
            return
        what = f"tensor {name} has no place in a {self.spec.family} with this config.json"
        raise UnsupportedModel(f"{self._files[name].path}: {what}")


def _open_files(path: Path) -> dict[str, SafetensorsFile]:
    """The file of each tensor, by the tensor's name."""
    if not (path / _INDEX).exists():
        file = SafetensorsFile(path / _SINGLE)
        return dict.fromkeys(file.entries, file)
    index = Fields(read_json(path / _INDEX), str(path / _INDEX)).section("weight_map")
    if index is None:
        raise DamagedFile(f"{path / _INDEX}: weight_map is missing")
    places = {tensor: index.text(tensor) for tensor in index.values}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise DamagedFile(f"{index.source}: {name!r} is not the name of a file in the same folder")
    shards = {name: SafetensorsFile(path / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in shards[name].entries:
            raise DamagedFile(f"{path / name}: tensor {tensor} is not in the file that {_INDEX} says")
    return {tensor: shards[name] for tensor, name in places.items()}
