"""The engines that can compute the core, where the cloud's part of a bundle lies: each gets a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from math import isnan
from typing import Final

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.engine_trial import ENGINES as GROUP
from trifold.edge.doctor.engine_trial import EngineTrial
from trifold.edge.doctor.finding import Finding, ok, skipped, warning
from trifold.edge.doctor.memory import available, fits
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.process import TrialFailed, tried
from trifold.edge.doctor.tiers import whole
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import FLOATS
from trifold.shared.errors import ConfigError

_TRIAL: Final = "trifold.edge.doctor.engine_trial"

_DEFAULT: Final = "onnxruntime"
_AGAIN: Final = "install onnxruntime again: `trifold version` tells which one is here"

_RIGHT: Final = 0.5
"""Rows of something else are as far from the shard's as these are long. An engine with float weights may be
a third of that away: the rows are random, and a router that is near to two experts takes the other.
"""


def examine(patient: Patient) -> Iterator[Finding]:
    cloud = next((folder for folder in whole(patient) if folder.tier == "cloud"), None)
    if cloud is None:
        yield skipped("this is no core: the cloud's part of a bundle does not lie here alone")
        return
    for name in sorted(entry_points(group=GROUP).names):
        if fits(cloud, patient) and _floats(cloud) * (name != _DEFAULT) <= available(patient):
            yield _found(name, cloud, patient)
        else:
            yield skipped(f"{name}: the core does not fit the memory")


def _floats(cloud: TierFolder) -> int:
    """Bytes of the float weights, which all engines but the default one compute with."""
    entry = cloud.manifest.training.get(cloud.tier, {}).get(FLOATS)
    return entry.size if entry else 0


def _found(name: str, cloud: TierFolder, patient: Patient) -> Finding:
    remedy = _AGAIN if name == _DEFAULT else ""
    try:
        arguments = name, str(patient.threads), str(cloud.path)
        trial = EngineTrial(**tried(_TRIAL, *arguments, config=patient.config))
    except ConfigError as error:
        return skipped(f"{name}: {error.message}")
    except TrialFailed as reason:
        return warning(f"{name}: {reason}", remedy)
    took = f"{trial.seconds * 1000:.1f} ms, {trial.error:.1%} off the shard's rows"
    told = f"{name}: {trial.fingerprint}: {took}"
    if not trial.exact:
        return warning(f"{told}: NOT exact", remedy)
    wrong = isnan(trial.error) or trial.error > _RIGHT
    return warning(f"{told}: wrong results", remedy) if wrong else ok(told)


ENGINES = Check("engines", examine, f"serve with another engine: `trifold cloud serve --engine {_DEFAULT}`")
