"""An arm64 machine, emulated: Debian's Python, the wheels of a lock, and Trifold's own wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests import debian

ROOT: Final = Path(__file__).parents[2]
BUILD: Final = ROOT / "build" / "arm64"
PLATFORMS: Final = ("aarch64-manylinux_2_28", "x86_64-manylinux_2_28")
PYTHONS: Final = ("3.11", "3.12", "3.13")
_QEMU: Final = BUILD / "qemu"


@dataclass(frozen=True)
class Machine:
    """A processor that qemu knows, and the Debian whose Python runs on it."""

    cpu: str
    suite: str
    python: str
    lock: str
    """What is installed: the name of a file in deploy/locks."""

    def __str__(self) -> str:
        return f"{self.cpu}, Python {self.python}"

    @property
    def core(self) -> Machine:
        """The same one with what the cloud needs."""
        return replace(self, lock="cloud")

    @property
    def root(self) -> Path:
        return BUILD / self.suite

    @property
    def site(self) -> Path:
        return BUILD / f"{self.suite}-{self.lock}"

    @property
    def interpreter(self) -> list[str]:
        """The command that runs this machine's Python here; it cannot start arm64 programs of its own."""
        emulator = [str(_QEMU / "usr" / "bin" / "qemu-aarch64"), "-L", str(self.root), "-cpu", self.cpu]
        settings = {"PYTHONHOME": self.root / "usr", "PYTHONPATH": self.site}
        given = [word for name, value in settings.items() for word in ("-E", f"{name}={value}")]
        return [*emulator, *given, str(self.root / "usr" / "bin" / f"python{self.python}")]

    def prepare(self, wheel: Path) -> None:
        """Brings here what is not here yet, and Trifold as it is now. Raises as debian.unpack() does."""
        packages = [f"python{self.python}", "libstdc++6"]
        debian.unpack(self.suite, "arm64", packages, self.root)
        debian.unpack("trixie", debian.host(), ["qemu-user"], _QEMU, dependencies=False)
        self._install_lock()
        self._pip("install", "--no-deps", "--reinstall", "--target", str(self.site), str(wheel))

    def _install_lock(self) -> None:
        lock = ROOT / "deploy" / "locks" / f"{self.lock}.txt"
        installed = self.site / ".lock"
        if installed.exists() and installed.read_bytes() == lock.read_bytes():
            return
        shutil.rmtree(self.site, ignore_errors=True)
        self._pip("install", "--require-hashes", "--target", str(self.site), "--requirements", str(lock))
        installed.write_bytes(lock.read_bytes())

    def _pip(self, verb: str, *arguments: str) -> None:
        uv("pip", verb, "--only-binary", ":all:", *target(PLATFORMS[0], self.python), *arguments)


MACHINES: Final = (
    Machine("cortex-a57", "bookworm", "3.11", "edge"),
    Machine("cortex-a76", "trixie", "3.13", "gateway"),
)
"""ARMv8.0, the processor of the first Jetsons; and ARMv8.2 with dot products and half floats, Orin's kind."""


def target(platform: str, python: str) -> list[str]:
    """What tells uv that it installs for another machine, with this Python."""
    return ["--python-platform", platform, "--python-version", python]


def build_wheel() -> Path:
    """Trifold as it is now."""
    out = BUILD / "dist"
    shutil.rmtree(out, ignore_errors=True)
    uv("build", "--wheel", "--out-dir", str(out), str(ROOT))
    (wheel,) = out.glob("*.whl")
    return wheel


def uv(*arguments: str) -> str:
    """What uv says on stderr. Raises RuntimeError with it where that fails."""
    command = [str(Path(sys.executable).parent / "uv"), *arguments]
    environment = os.environ | {"UV_NO_CONFIG": "1", "NO_COLOR": "1", "UV_LINK_MODE": "copy"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"`uv {' '.join(arguments)}` failed:\n{done.stderr}")
    return done.stderr
