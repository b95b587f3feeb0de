"""What people get wrong on the command line: a message that names it, an exit code, and never a traceback."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import edit_json
from tests.processes import Processes

Damage = Callable[[Path], None]


def trifold(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trifold.shared.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def refused(code: int, words: str, *arguments: object) -> None:
    done = trifold(*arguments)
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def cut_short(checkpoint: Path) -> None:
    weights = next(checkpoint.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_weights(checkpoint: Path) -> None:
    next(checkpoint.glob("*.safetensors")).unlink()


def lose_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def another_family(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="bert")


def another_size(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", intermediate_size=100)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (cut_short, 66, "safetensors"),
        (lose_weights, 66, "safetensors"),
        (lose_config, 66, "config.json"),
        (another_family, 65, "bert"),
        (another_size, 66, "mlp"),
    ],
)
def test_a_checkpoint_that_cannot_be_split_leaves_no_bundle(
    checkpoint: Path, tmp_path: Path, damage: Damage, code: int, words: str
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(copy)
    refused(code, words, "split", copy, "--out", tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_splitting_never_writes_over_a_folder_that_is_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(78, str(tmp_path), "split", checkpoint, "--out", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("ratio", ["70/20", "a/b/c", "0/0/0", "-1/50/51"])
def test_a_ratio_that_is_none_is_refused(checkpoint: Path, ratio: str) -> None:
    refused(64, "ratio", "plan", checkpoint, f"--ratio={ratio}")


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    for command in (["cloud", "serve"], ["edge", "serve"], ["generate", "--prompt", "x", "--bundle"]):
        refused(66, str(tmp_path), *command, tmp_path / "nowhere")


def test_an_edge_that_is_not_running_is_asked_for(bundle: Path, unused_tcp_port: int) -> None:
    edge = f"127.0.0.1:{unused_tcp_port}"
    refused(69, edge, "generate", "--edge", edge, "--bundle", bundle, "--prompt", "x")


def test_an_unknown_option_is_a_usage_error(bundle: Path) -> None:
    done = trifold("generate", "--bundle", bundle, "--tempreature", "1")
    assert done.returncode == 2
    assert "--temperature" in done.stderr


def test_requests_that_cannot_work_are_refused_and_the_next_one_is_served(
    bundle: Path, attending_bundle: Path, tmp_path: Path
) -> None:
    with Processes(bundle) as tiers:
        generate = ("generate", "--edge", tiers.edge, "--bundle", bundle)
        refused(64, "positions", *generate, "--prompt", "long " * 200)
        refused(64, "max_tokens", *generate, "--prompt", "x", "--max-tokens", 0)
        refused(64, "temperature", *generate, "--prompt", "x", "--temperature", -1)
        refused(64, "prompt", *generate, "--prompt", "")
        refused(66, "journal", *generate, "--resume", tmp_path / "journal")
        wrong = ("generate", "--edge", tiers.edge, "--bundle", attending_bundle, "--prompt", "x")
        refused(65, "bundle", *wrong)
        assert trifold(*generate, "--prompt", "x", "--max-tokens", 2).returncode == 0


def test_a_text_to_verify_with_is_asked_for(bundle: Path, checkpoint: Path) -> None:
    refused(66, "--text", "verify", bundle, "--against", checkpoint)
