"""The options that the device's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trifold.shared.settings import DeviceSettings

Edge = Annotated[str | None, DeviceSettings.flag("edge")]
Bundle = Annotated[Path | None, DeviceSettings.flag("bundle")]
Timeout = Annotated[float | None, DeviceSettings.flag("timeout")]
Threads = Annotated[int | None, DeviceSettings.flag("threads")]
Inexact = Annotated[bool | None, DeviceSettings.flag("inexact")]
Tls = Annotated[Path | None, DeviceSettings.flag("tls")]
Insecure = Annotated[bool | None, DeviceSettings.flag("insecure")]
LogLevel = Annotated[str | None, DeviceSettings.flag("log_level")]
Traces = Annotated[str | None, DeviceSettings.flag("traces")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings. [TRIFOLD_CONFIG]")]

MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Choose among that many tokens only; 0 is no limit.")]
TopP = Annotated[float, typer.Option("--top-p", help="Choose among the likeliest tokens of that share only.")]
Seed = Annotated[int, typer.Option("--seed", help="Equal seeds give equal texts.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")]
