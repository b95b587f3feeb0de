"""The one table of settings: flags take their help from it, the documentation its rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field

from trifold.shared.config import KNOWN, Settings


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT")
    return value


def _torch_device(value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise ValueError("it must be cpu, cuda or cuda:N")
    return value


def _collector(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+:\d{1,5}/?", value):
        raise ValueError("it must be http://HOST:PORT or https://HOST:PORT")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Address = Annotated[str, AfterValidator(_address)]
TorchDevice = Annotated[str, BeforeValidator(_lower), AfterValidator(_torch_device)]
Collector = Annotated[str, AfterValidator(_collector)]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)]
EngineName = Annotated[Literal["onnxruntime", "torch", "tensorrt"], BeforeValidator(_lower)]
WeightFormat = Annotated[Literal["bf16", "fp32", "int8"], BeforeValidator(_lower)]
LogFormat = Annotated[Literal["console", "json"], BeforeValidator(_lower)]


class ProcessSettings(Settings):
    """What every process that holds a part of a bundle has."""

    bundle: Path = Field(description="Folder of the bundle, or of this tier's part of it.")
    threads: int = Field(0, ge=0, description="Threads of the engine; 0 is one per core.")
    log_level: LogLevel = Field("warning", description="Least level logged: debug, info, warning or error.")
    tls: Path | None = Field(
        None, description="Folder of the node, from `trifold node enroll`; without it there is no TLS."
    )
    insecure: bool = Field(False, description="Without TLS also where others can reach it.")


class TierSettings(ProcessSettings):
    """What every tier has."""

    inexact: bool = Field(False, description="Run even where the numerics self-test fails.")
    traces: Collector | None = Field(
        None, description="URL of an OpenTelemetry collector (OTLP over gRPC) that gets traces of requests."
    )


class LoggedSettings(Settings):
    """What every service has."""

    log_format: LogFormat = Field("console", description="Form of the log: console, or json a line.")


class WatchedSettings(LoggedSettings):
    """What every service of the model has."""

    metrics: Address | None = Field(
        None, description="HOST:PORT that shows metrics to Prometheus, over plain HTTP to whoever asks."
    )


class ServiceSettings(WatchedSettings, TierSettings):
    """What the two services share."""

    positional = "bundle"

    listen: Address
    kv_memory: ByteSize = Field(
        ByteSize(2 * 1024**3),
        description="Most memory for the KV caches of all sessions, such as 512MiB or 8GiB.",
    )
    streams: int = Field(
        64, ge=1, description="Most sessions that run at a time; new ones above it are told to come later."
    )
    lease: float = Field(30.0, gt=0, description="Seconds that a session without a stream is kept.")
    grace: float = Field(
        10.0, ge=0, description="Seconds that running sessions get to end when the service stops."
    )


class CloudSettings(ServiceSettings):
    """`trifold cloud serve`."""

    section = "cloud"

    listen: Address = Field("127.0.0.1:50060", description="HOST:PORT to serve on; port 0 takes a free one.")
    engine: EngineName = Field("onnxruntime", description="What computes: onnxruntime, torch or tensorrt.")
    device: TorchDevice = Field("cpu", description="Where torch computes: cpu, cuda or cuda:N.")
    weights: WeightFormat = Field(
        "bf16", description="What torch holds weights in: bf16, fp32 or int8 (a scale for each output)."
    )
    prefix_memory: ByteSize = Field(
        ByteSize(256 * 1024**2),
        description="Memory for what sessions of a tenant that begin alike need not compute twice; 0: none.",
    )


class CloudTrainSettings(WatchedSettings, ProcessSettings):
    """`trifold cloud train`."""

    section = "train"
    positional = "bundle"

    listen: Address = Field("127.0.0.1:50062", description="HOST:PORT to serve on; port 0 takes a free one.")
    activation_memory: ByteSize = Field(
        ByteSize(2 * 1024**3),
        description="Memory for the activations of all sites; what does not fit is computed again.",
    )
    row_memory: ByteSize = Field(
        ByteSize(1024**3),
        description="Most memory for the rows of batches held; what does not fit is asked for again.",
    )
    device: TorchDevice = Field("cpu", description="Where the core computes: cpu, cuda or cuda:N.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="What its weights are held in: fp32 or bf16.")
    lease: float = Field(60.0, gt=0, description="Seconds that the batches of a lost site are held.")


class EdgeSettings(ServiceSettings):
    """`trifold edge serve`."""

    section = "edge"

    listen: Address = Field("127.0.0.1:50061", description="HOST:PORT to serve on; port 0 takes a free one.")
    core: Address = Field("127.0.0.1:50060", description="HOST:PORT of the cloud.")
    timeout: float = Field(30.0, gt=0, description="Seconds to wait for an answer of the cloud.")


class DeviceSettings(TierSettings):
    """`trifold generate` and `trifold chat`."""

    section = "device"

    edge: Address = Field("127.0.0.1:50061", description="HOST:PORT of the edge.")
    timeout: float = Field(30.0, gt=0, description="Seconds to wait for an answer of the edge.")


class SiteSettings(LoggedSettings, ProcessSettings):
    """`trifold edge train`."""

    section = "site"
    positional = "bundle"

    @classmethod
    def spelling(cls, name: str) -> str:
        return "--site" if name == "name" else super().spelling(name)

    name: str = Field("", description="Name of the site; none in a simulation.")
    text: Path = Field(description="Folder of the site's text files.")
    simulation: bool = Field(False, description="Every folder in --text is a site of its own.")
    cloud: Address = Field("127.0.0.1:50062", description="HOST:PORT of the cloud's training process.")
    state: Path = Field(Path("site"), description="Folder that the site keeps between rounds.")
    listen: Path | None = Field(
        None, description="Unix socket for the site's node, instead of trainer.sock in --state."
    )
    timeout: float = Field(120.0, gt=0, description="Seconds to wait for an answer of the cloud.")


class JoinSettings(Settings):
    """`trifold edge join`."""

    section = "join"
    positional = "superlink"

    superlink: Address = Field(description="HOST:PORT of the federation's SuperLink.")
    trainer: Path = Field(description="Unix socket of the site's trainer: trainer.sock in its --state.")
    port: int = Field(9400, ge=1, le=65535, description="Port on loopback for this node's own processes.")
    root_certificates: Path | None = Field(
        None, description="Certificate of the authority that signed the SuperLink's."
    )
    key: Path | None = Field(None, description="Private key that the SuperLink knows this site by.")
    insecure: bool = Field(False, description="Without TLS: on loopback only.")


class ServeSettings(WatchedSettings, TierSettings):
    """`trifold device serve`."""

    section = "serve"
    positional = "bundle"

    edge: Address = Field("127.0.0.1:50061", description="HOST:PORT of the edge.")
    listen: Address = Field("127.0.0.1:50063", description="HOST:PORT for gRPC; port 0 takes a free one.")
    http: Address = Field("127.0.0.1:8080", description="HOST:PORT for HTTP; port 0 takes a free one.")
    model: str = Field("trifold", description="What clients call the model.")
    keys: Path | None = Field(None, description="File of API keys; without one anybody may call.")
    requests_per_minute: int = Field(
        0, ge=0, description="Most requests of a key in a minute; 0 is no limit."
    )
    tokens_per_minute: int = Field(0, ge=0, description="Most tokens of a key in a minute; 0 is no limit.")
    content_filter: Path | None = Field(None, description="TOML file of words that nobody gets or gives.")
    streams: int = Field(
        16, ge=1, description="Most answers given at a time; more wait, or are told to come later."
    )
    max_tokens: int = Field(1024, ge=1, description="Most tokens of an answer whose request does not say.")
    journals: Path = Field(Path("journals"), description="Folder of generations that can be resumed by id.")
    timeout: float = Field(30.0, gt=0, description="Seconds for an answer.")
    grace: float = Field(10.0, ge=0, description="Seconds that answers get to end when the service stops.")


class AuthoritySettings(LoggedSettings):
    """`trifold certs serve`."""

    section = "authority"
    positional = "folder"

    folder: Path = Field(description="Folder of the authority, from `trifold certs init`.")
    listen: Address = Field("127.0.0.1:50070", description="HOST:PORT where machines enrol, with a token.")
    listen_nodes: Address = Field(
        "127.0.0.1:50071", description="HOST:PORT where nodes renew their certificates."
    )
    life: float = Field(
        86_400.0, ge=5, le=86_400, description="Seconds that certificates hold: 24 hours at most."
    )
    log_level: LogLevel = Field("warning", description="Least level logged: debug, info, warning or error.")


SETTINGS: Final = tuple(KNOWN)
"""In the order of the documentation."""
