"""The device's SDK: clients that generate text with the device's part of a model here, the rest elsewhere."""

import trifold.shared.grpc_engine  # noqa: F401  # isort: skip - before grpc

from trifold.device.client.async_client import AsyncClient
from trifold.device.client.chat import Message
from trifold.device.client.client import Client
from trifold.device.client.generation import Chunk
from trifold.device.client.trace import Trace
from trifold.shared import errors
from trifold.shared.runtime.sampling import Sampling

__all__ = ["AsyncClient", "Chunk", "Client", "Message", "Sampling", "Trace", "errors"]
