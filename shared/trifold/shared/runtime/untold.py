"""ONNX Runtime without its telemetry, which must be chosen before it is imported: by importing this module.

Since 1.29 its wheels for Linux tell their maker about every process, model and session, and keep an id of the
machine (microsoft/onnxruntime pull request 27379). Nothing leaves a site but what docs/privacy.md says. What
ORT_DISABLE_TELEMETRY says already is left alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
