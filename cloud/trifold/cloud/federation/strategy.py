"""Flower's strategies by name, fed with unpacked updates and kept from one process to the next."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from trifold.cloud.federation.aggregation import refactored_mean
from trifold.cloud.federation.settings import RunSettings, StrategyName
from trifold.shared.errors import ConfigError
from trifold.shared.federation.packing import Arrays

_CLASSES: Final[dict[StrategyName, type[flower.FedAvg]]] = {
    "fedavg": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedmedian": flower.FedMedian,
    "trimmed-mean": flower.FedTrimmedAvg,
    "krum": flower.MultiKrum,
}
"""Krum is Multi-Krum: the mean of all updates but `num_malicious_nodes`, or of `num_nodes_to_select`."""

_DEFAULTS: Final[dict[StrategyName, dict[str, float]]] = {
    "fedavgm": {"server_momentum": 0.9},
    "fedprox": {"proximal_mu": 0.01},
    "krum": {"num_malicious_nodes": 1},
}

_MOMENTS: Final = ("m_t", "v_t")
"""Attributes of FedAdam and FedYogi, arrays by name."""

_MOMENTUM: Final = "momentum_vector"
"""That of FedAvgM: arrays in the order of their names."""

_WEIGHT: Final = "num-examples"


class Aggregator:
    """From the factors of a round and the sites' updates to the factors of the next.

    `state` is what the strategy remembers (moments of the server's optimizer), as arrays by name. The same
    factors, updates and state give the same bits: sites are taken in the order of their names. All sites have
    the same weight, for all take the same number of steps; a weight that a site claims could not be checked.
    """

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self._strategy = _strategy(settings)

    @property
    def proximal(self) -> float:
        """FedProx's mu, which sites train with; 0 for the others."""
        return float(getattr(self._strategy, "proximal_mu", 0.0))

    def aggregate(self, number: int, factors: Arrays, updates: Mapping[str, Arrays]) -> Arrays:
        """The factors after round `number`, the first being 1."""
        trained = {site: _added(factors, updates[site]) for site in sorted(updates)}
        if self._settings.aggregation == "svd":
            return refactored_mean(factors, list(trained.values()))
        return self._flowers(number, factors, trained)

    def state(self) -> dict[str, NDArray[Any]]:
        known = vars(self._strategy)
        moments = {
            f"{part}/{name}": array for part in _MOMENTS for name, array in (known.get(part) or {}).items()
        }
        momentum = enumerate(known.get(_MOMENTUM) or [])
        return moments | {f"{_MOMENTUM}/{index:06}": array for index, array in momentum}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        for part in _MOMENTS:
            if kept := _part(state, part):
                setattr(self._strategy, part, kept)
        if kept := _part(state, _MOMENTUM):
            setattr(self._strategy, _MOMENTUM, [kept[index] for index in sorted(kept)])

    def _flowers(self, number: int, factors: Arrays, trained: Mapping[str, Arrays]) -> Arrays:
        # What configure_train would set; it would also wait for sites and sample them, which is ours.
        if isinstance(self._strategy, flower.FedAvgM):
            self._strategy.current_arrays = _record(factors)
        elif hasattr(self._strategy, "current_arrays"):
            self._strategy.current_arrays = dict(sorted(factors.items()))
        if isinstance(self._strategy, flower.MultiKrum):
            honest = len(trained) - self._strategy.num_malicious_nodes
            chosen = self._settings.options.get("num_nodes_to_select", honest)
            self._strategy.num_nodes_to_select = max(1, int(chosen))
        replies = [_reply(arrays) for arrays in trained.values()]
        result, _ = self._strategy.aggregate_train(number, replies)
        if result is None:
            raise ConfigError(f"{self._settings.strategy} made nothing of {len(replies)} updates")
        # FedAdam returns float64.
        return {name: np.ascontiguousarray(array.numpy(), np.float32) for name, array in result.items()}


def _strategy(settings: RunSettings) -> flower.FedAvg:
    """Raises ConfigError for an option that the strategy does not have, or a value that it refuses."""
    kind = _CLASSES[settings.strategy]
    options = _DEFAULTS.get(settings.strategy, {}) | settings.options
    # What Flower's own loop is told and ours decides.
    ours = inspect.signature(flower.FedAvg.__init__).parameters
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in ours]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{settings.strategy} has no option {name}: it has {', '.join(known) or 'none'}"
            )
    whole = {name: int(value) if name.startswith("num_") else value for name, value in options.items()}
    try:
        return kind(weighted_by_key=_WEIGHT, **whole)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"{settings.strategy}: {error}") from None


def _added(factors: Arrays, update: Arrays) -> Arrays:
    """The factors as a site has trained them; those that it did not train stay."""
    return {
        name: array + update[name] if name in update else array for name, array in sorted(factors.items())
    }


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in sorted(arrays.items())})


def _reply(arrays: Arrays) -> Message:
    """A site's arrays as Flower's strategies want them: in a reply, with the weight of the site."""
    content = RecordDict({"arrays": _record(arrays), "metrics": MetricRecord({_WEIGHT: 1})})
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type="train",
    )
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def _part(state: Mapping[str, NDArray[Any]], part: str) -> dict[str, NDArray[Any]]:
    return {
        name.removeprefix(f"{part}/"): array for name, array in state.items() if name.startswith(f"{part}/")
    }
