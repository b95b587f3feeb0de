"""A real inference on each execution provider of ONNX Runtime, and which nodes ran where."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isnan
from typing import Final

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import onnxruntime as ort

from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding, fault, ok, skipped, warning
from trifold.edge.doctor.memory import fits
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.process import TrialFailed, tried
from trifold.edge.doctor.tiers import whole
from trifold.edge.doctor.trial import Trial, probe, run_shard
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import TrifoldError
from trifold.shared.runtime.engine import PROVIDER

_ELSEWHERE: Final = {"AzureExecutionProvider": "it calls services of others, and computes nothing here"}

_TRIAL: Final = "trifold.edge.doctor.trial"

_RIGHT: Final = 0.05
"""The largest difference from the CPU, relative to the largest value, that other arithmetic explains."""

_SPEED_ONLY: Final = f"Trifold's shards run on {PROVIDER}, and need no other"

_REMEDIES: Final = {
    "CUDAExecutionProvider": "install the CUDA and cuDNN that this onnxruntime was built for (on a Jetson: "
    "sudo apt-get install nvidia-jetpack)",
    "TensorrtExecutionProvider": "install the TensorRT that this onnxruntime was built for (on a Jetson: "
    "sudo apt-get install nvidia-jetpack)",
}


def examine(patient: Patient) -> Iterator[Finding]:
    folders = [folder for folder in whole(patient) if fits(folder, patient)]
    for provider in ort.get_available_providers():
        if provider in _ELSEWHERE:
            yield skipped(f"{provider}: {_ELSEWHERE[provider]}")
        elif provider == PROVIDER:
            yield _own(patient, folders)
        else:
            yield _other(provider, patient, folders)


def _own(patient: Patient, folders: list[TierFolder]) -> Finding:
    """The provider that serves: here, because a machine may be unable to start another process."""
    try:
        trials = [probe(PROVIDER, patient.threads)]
        trials += [run_shard(PROVIDER, folder, patient.threads) for folder in folders]
    except TrifoldError as error:
        return fault(f"{PROVIDER}: {error.message}")
    told = f"{PROVIDER}: {_told(trials)}"
    return fault(f"{told}: wrong results") if _worst(trials) > _RIGHT else ok(told)


def _other(provider: str, patient: Patient, folders: list[TierFolder]) -> Finding:
    remedy = f"{_REMEDIES.get(provider, f'install what {provider} needs')}; or leave it: {_SPEED_ONLY}"
    paths = [str(folder.path) for folder in folders]
    try:
        trials = [Trial(**found) for found in tried(_TRIAL, provider, str(patient.threads), *paths)]
    except TrialFailed as reason:
        return warning(f"{provider}: {reason}", remedy)
    told = f"{provider}: {_told(trials)}"
    if _worst(trials) > _RIGHT:
        return warning(f"{told}: wrong results", remedy)
    if not any(found.nodes.get(provider) for found in trials):
        return warning(f"{told}: it has taken no node", remedy)
    return ok(told)


def _told(trials: list[Trial]) -> str:
    return "; ".join(
        f"{trial.graph}: {_where(trial.nodes)}, {trial.seconds * 1000:.1f} ms" + _off(trial.error)
        for trial in trials
    )


def _off(error: float) -> str:
    """On the CPU a shard is what the others are measured by."""
    return f", off by {error:.0e}" if error else ""


def _where(nodes: dict[str, int]) -> str:
    return " and ".join(
        f"{count} nodes on {provider.removesuffix('ExecutionProvider')}" for provider, count in nodes.items()
    )


def _worst(trials: list[Trial]) -> float:
    """The largest error; what is not a number is the largest of all."""
    return max(inf if isnan(trial.error) else trial.error for trial in trials)


PROVIDERS = Check(
    "providers", examine, "install onnxruntime again: `trifold version` tells which one is here"
)
