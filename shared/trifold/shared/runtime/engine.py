"""The engine: an InferenceSession of ONNX Runtime, from bytes in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Final

import onnxruntime as ort

from trifold.shared.errors import DamagedFile

PROVIDER: Final = "CPUExecutionProvider"

WEIGHTS: Final = "weights.bin"

_NO_FLASH: Final = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_environment = Lock()


def load(model: bytes, weights: bytes, *, threads: int, whole_attention: bool) -> ort.InferenceSession:
    """A session that runs `model` with `weights` as its weights.bin; both may be forgotten afterwards.

    `threads` within an operator, 0 for one per physical core. `whole_attention` has attention computed over
    all keys at once instead of in tiles.

    Raises DamagedFile when ONNX Runtime cannot make sense of the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait for the next operator spin, but not from one call to the next: other tiers need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if weights:
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    try:
        with _attention(whole_attention):
            return ort.InferenceSession(model, options, providers=[PROVIDER])
    except Exception as error:
        raise DamagedFile(f"model.onnx cannot be loaded by onnxruntime {ort.__version__}: {error}") from error


@contextmanager
def _attention(whole: bool) -> Iterator[None]:
    """ONNX Runtime has an environment variable for this and nothing else, and looks at it while loading."""
    with _environment:
        before = os.environ.pop(_NO_FLASH, None)
        if whole:
            os.environ[_NO_FLASH] = "1"
        try:
            yield
        finally:
            os.environ.pop(_NO_FLASH, None)
            if before is not None:
                os.environ[_NO_FLASH] = before
