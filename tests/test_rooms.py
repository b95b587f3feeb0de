"""The house keeps its order: who may import whom, and where torch may appear."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "proto": {"proto"},
    "shared": {"shared", "proto"},
    "cloud": {"cloud", "shared", "proto"},
    "edge": {"edge", "shared", "proto"},
    "device": {"device", "shared", "proto"},
}
TORCH = {"torch", "transformers", "peft"}
TORCH_FOLDERS = (
    "shared/trifold/shared/training",
    "cloud/trifold/cloud/core/engines/torch",
    "cloud/trifold/cloud/train",
    "cloud/trifold/cloud/verify",
)
FLOWER_FOLDERS = ("cloud/trifold/cloud/federation", "edge/trifold/edge/federation")


def sources(room: str) -> Iterator[Path]:
    return (ROOT / room).rglob("*.py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} imports relatively: write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imports(path)
        if name.startswith("trifold.") and name.split(".")[1] not in MAY_IMPORT[room]
    ]
    assert not wrong


@pytest.mark.parametrize("room", MAY_IMPORT)
@pytest.mark.parametrize(("packages", "folders"), [(TORCH, TORCH_FOLDERS), ({"flwr"}, FLOWER_FOLDERS)])
def test_torch_and_flower_appear_only_in_their_folders(
    room: str, packages: set[str], folders: tuple[str, ...]
) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imports(path)
        if name.split(".")[0] in packages and not str(path.relative_to(ROOT)).startswith(folders)
    ]
    assert not wrong


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_trifold_is_a_namespace_that_all_rooms_share(room: str) -> None:
    assert any(sources(room))
    assert not (ROOT / room / "trifold" / "__init__.py").exists()


def test_serving_on_a_cpu_asks_for_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    serving = [*project["dependencies"], *extras["cloud"], *extras["edge"], *extras["device"]]
    assert not [requirement for requirement in serving if requirement.startswith((*TORCH, "flwr"))]
