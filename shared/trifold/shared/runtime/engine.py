"""The engine: an InferenceSession of ONNX Runtime, from bytes in memory."""

from __future__ import annotations

import os
from collections import Counter
from threading import Lock
from typing import Final

import trifold.shared.runtime.untold  # noqa: F401  # isort: skip - before onnxruntime

import onnxruntime as ort

from trifold.shared.errors import DamagedFile

PROVIDER: Final = "CPUExecutionProvider"

WEIGHTS: Final = "weights.bin"


class _AttentionWithoutTiles:
    """Attention over all keys at once: tiles would be as large as the L2 cache allows, and so would sums.

    ONNX Runtime has an environment variable for this and nothing else, and looks there while it loads;
    threads may load at the same time.
    """

    _NAME: Final = "ORT_GQA_DISABLE_FLASH_ATTENTION"

    def __init__(self) -> None:
        self._lock = Lock()
        self._loads = 0
        self._before: str | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._loads:
                self._before = os.environ.get(self._NAME)
                os.environ[self._NAME] = "1"
            self._loads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._loads -= 1
            if not self._loads:
                del os.environ[self._NAME]
                if self._before is not None:
                    os.environ[self._NAME] = self._before


_attention_without_tiles = _AttentionWithoutTiles()


def load(
    model: bytes, weights: bytes | memoryview, *, threads: int, provider: str = PROVIDER
) -> ort.InferenceSession:
    """A session that runs `model` with `weights` as its weights.bin; both may be forgotten afterwards.

    `threads` is how many work on an operator, 0 for one for each physical core. What `provider` cannot run,
    the CPU does: placement() tells.

    Raises DamagedFile when ONNX Runtime cannot make sense of the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads spin from one operator to the next, but not between calls: other tiers need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if weights:
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    try:
        with _attention_without_tiles:
            return ort.InferenceSession(model, options, providers=list(dict.fromkeys((provider, PROVIDER))))
    except Exception as error:
        raise DamagedFile(f"model.onnx cannot be loaded by onnxruntime {ort.__version__}: {error}") from error


def placement(session: ort.InferenceSession) -> dict[str, int]:
    """How many of a session's nodes each execution provider runs."""
    placed: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        placed[part.ep_name] += len(part.get_nodes())
    return dict(placed)
