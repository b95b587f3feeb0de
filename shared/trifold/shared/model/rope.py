"""Rotary position embedding: from the keys of a config to final frequencies.

Follows `modeling_rope_utils.py` of transformers 5.23, in fp32 as there: models are trained with frequencies
rounded so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from trifold.shared.errors import DamagedFile, UnsupportedModel
from trifold.shared.model.fields import Fields
from trifold.shared.model.spec import Rope

Floats = NDArray[np.float32]
Kind = Literal["default", "linear", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """What a config says of rope: `rope_parameters` in transformers 5, `rope_scaling` before."""

    kind: Kind
    theta: float
    fields: Fields
    max_positions: int
    original_positions: int

    @classmethod
    def read(cls, config: Fields, default_theta: float = 10_000.0) -> RopeConfig:
        fields = config.section("rope_scaling") or config.section("rope_parameters")
        fields = fields or Fields({}, config.source)
        kind = fields.text("rope_type", fields.text("type", "default"))
        if kind not in get_args(Kind):
            raise UnsupportedModel(f"{fields.source}: rope of type {kind!r} is not supported")
        for place in (config, fields):
            place.expect("partial_rotary_factor", 1.0)
        if fields.has("mrope_section"):
            raise UnsupportedModel(f"{fields.source}: multimodal rope (mrope_section) is not supported")
        if any(isinstance(value, dict) for value in fields.values.values()):
            raise UnsupportedModel(f"{fields.source}: rope that differs between layers is not supported")
        outer = config.number("rope_theta", default_theta, above=1)
        most = config.integer("max_position_embeddings")
        original = fields.integer("original_max_position_embeddings", most)
        return cls(
            kind=cast(Kind, kind),
            theta=fields.number("rope_theta", outer, above=1),
            fields=fields,
            max_positions=most,
            original_positions=config.integer("original_max_position_embeddings", original),
        )

    def rope(self, dim: int) -> Rope:
        """The rotation of `dim` values of a head."""
        if dim % 2:
            raise UnsupportedModel(f"{self.fields.source}: rope over an odd number of values ({dim})")
        with np.errstate(all="ignore"):  # what overflows here shows below
            frequencies, scale = np.float32(1) / self._wavelengths(dim), 1.0
            match self.kind:
                case "linear":
                    frequencies /= np.float32(self._factor)
                case "llama3":
                    frequencies = self._llama3(frequencies)
                case "yarn":
                    frequencies, scale = self._yarn(dim), self._yarn_scale()
        if not np.isfinite(frequencies).all():
            raise DamagedFile(f"{self.fields.source}: these values give rope without finite frequencies")
        return Rope(dim=dim, kind=self.kind, inverse_frequencies=tuple(frequencies.tolist()), scale=scale)

    def softmax_gain(self) -> float:
        """What DeepSeek multiplies the softmax scale by: mscale², from `mscale_all_dim`."""
        all_dim = self.fields.number("mscale_all_dim", 0.0, above=-1)
        if self.kind == "default" or not all_dim:
            return 1.0
        return _mscale(self._factor, all_dim) ** 2

    @property
    def _factor(self) -> float:
        return self.fields.number("factor", self.max_positions / self.original_positions, above=1e-3)

    def _yarn_scale(self) -> float:
        mscale, all_dim = (self.fields.number(key, 0.0, above=-1) for key in ("mscale", "mscale_all_dim"))
        suggested = _mscale(self._factor)
        if mscale and all_dim:
            suggested = _mscale(self._factor, mscale) / _mscale(self._factor, all_dim)
        return self.fields.number("attention_factor", suggested, above=0)

    def _yarn(self, dim: int) -> Floats:
        """YaRN (arXiv 2309.00071, 3.2): low frequencies interpolated, high ones kept, a ramp between."""
        low = self._turning(self.fields.number("beta_fast", 32.0, above=0), dim)
        high = self._turning(self.fields.number("beta_slow", 1.0, above=0), dim)
        if self.fields.flag("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        indices = np.arange(dim // 2, dtype=np.float32)
        kept = np.float32(1) - np.clip((indices - np.float32(low)) / np.float32(width), 0, 1)
        wavelengths = self._wavelengths(dim)
        interpolated = np.float32(1) / (np.float32(self._factor) * wavelengths)
        return cast(Floats, interpolated * (np.float32(1) - kept) + np.float32(1) / wavelengths * kept)

    def _turning(self, times: float, dim: int) -> float:
        """The index of the frequency that turns so many times within the original context."""
        wavelength = self.original_positions / (times * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(self.theta))

    def _llama3(self, frequencies: Floats) -> Floats:
        """Llama 3.1's scaling: low frequencies interpolated, high ones kept, smooth in wavelength between."""
        low, high = (self.fields.number(f"{end}_freq_factor", above=0) for end in ("low", "high"))
        if low >= high:
            raise DamagedFile(
                f"{self.fields.source}: low_freq_factor {low} is not below high_freq_factor {high}"
            )
        factor, original = np.float32(self._factor), np.float32(self.original_positions)
        wavelengths = np.float32(2 * math.pi) / frequencies
        smooth = (original / wavelengths - np.float32(low)) / np.float32(high - low)
        smoothed = (1 - smooth) * frequencies / factor + smooth * frequencies
        scaled = np.where(wavelengths > self.original_positions / low, frequencies / factor, smoothed)
        return np.where(wavelengths < self.original_positions / high, frequencies, scaled)

    def _wavelengths(self, dim: int) -> Floats:
        """Positions per radian, for each pair of values."""
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        return cast(Floats, np.float32(self.theta) ** exponents)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
