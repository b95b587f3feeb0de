"""Generates the stubs beside every .proto; with --check, says whether the committed ones are current."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOM = Path(__file__).parent
STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Writes the stubs of all .proto files under `out`, in the folders of their packages."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(path) for path in ROOM.rglob("*.proto"))
    # protoc looks for its plugins on the path; they lie beside this interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    plugins = [f"--{plugin}_out={out}" for plugin in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{ROOM}", f"-I{well_known}", *plugins, *sources]) != 0:
        sys.exit("protoc failed: its messages are above.")


def stubs(folder: Path) -> dict[str, str]:
    """The generated files under a folder: relative path to text."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.name.endswith(STUBS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args().check:
        generate(ROOM)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = stubs(Path(folder)), stubs(ROOM)
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if stale:
        sys.exit(f"Stale stubs: {', '.join(stale)}. Run `make proto` and commit the result.")
    print(f"{len(fresh)} stubs are current")


if __name__ == "__main__":
    main()
