"""Programs and files out of Debian's packages, for tests that need them. Nothing is installed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

_KEYRINGS: Final = Path("/usr/share/keyrings")
_TOOLS: Final = ("apt-get", "dpkg-deb", "dpkg")

_SETTINGS: Final = """\
Dir "{folder}";
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "-";
Dir::Etc::Parts "-";
Dir::State::Lists "{folder}/lists";
Dir::State::Status "{folder}/status";
Dir::Cache "{folder}/cache";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Debug::NoLocking "true";
"""


class NotDebian(Exception):
    """This machine lacks what the set-up needs; the message says what."""


def keyring() -> Path:
    """The keys that Debian signs with. Raises NotDebian where they or Debian's tools are missing."""
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    found = sorted(_KEYRINGS.glob("debian-archive-keyring.*"))
    if missing or not found:
        what = ", ".join(missing) or "the package debian-archive-keyring"
        raise NotDebian(
            f"this needs Debian, from whose packages it takes what it needs: here is no {what}. "
            "On another machine, run it in a container of Debian"
        )
    return found[0]


def host() -> str:
    """This machine's architecture, in Debian's words. Raises NotDebian."""
    keyring()
    return _output("dpkg", "--print-architecture").strip()


def unpack(
    suite: str, architecture: str, packages: list[str], into: Path, *, dependencies: bool = True
) -> None:
    """Unpacks packages, and all that they depend on, without running any of their scripts.

    What is there already, of the same packages, stays. Raises NotDebian, or CalledProcessError where a
    download fails.
    """
    apt = into.with_name(f"{into.name}.apt")
    recipe = hashlib.sha256(" ".join([suite, architecture, *packages]).encode()).hexdigest()
    done = into / ".unpacked"
    if done.exists() and done.read_text() == recipe:
        return
    shutil.rmtree(into, ignore_errors=True)
    shutil.rmtree(apt, ignore_errors=True)
    for part in ("lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()
    source = f"deb [signed-by={keyring()}] http://deb.debian.org/debian {suite} main\n"
    (apt / "sources.list").write_text(source)
    (apt / "apt.conf").write_text(_SETTINGS.format(folder=apt, architecture=architecture))
    environment = {"APT_CONFIG": str(apt / "apt.conf"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    _output("apt-get", "--quiet", "update", environment=environment)
    command = ["apt-get", "--quiet", "--yes", "--download-only", "install", *packages]
    archives = apt / "cache" / "archives"
    if not dependencies:
        command, archives = ["apt-get", "--quiet", "download", *packages], apt / "cache"
    _output(*command, environment=environment, cwd=archives)
    into.mkdir(parents=True)
    for package in sorted(archives.glob("*.deb")):
        _output("dpkg-deb", "--extract", str(package), str(into))
    shutil.rmtree(apt)
    if not (into / "lib").exists():
        (into / "lib").symlink_to("usr/lib")  # which a script of Debian's base system would do
    done.write_text(recipe)


def _output(*command: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, " ".join(command), done.stdout, done.stderr)
    return done.stdout
