from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.shared.sites import train_bundle
from tests.training_process import TrainingProcess
from trifold.edge.federation.core import RemoteCore
from trifold.edge.federation.frames import Record
from trifold.edge.federation.text import SiteText
from trifold.edge.federation.trainer import SiteTrainer
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.errors import DeadlineExceeded, DigestMismatch, InvalidRequest
from trifold.shared.federation.packing import Arrays, pack, shapes_of, unpack

LORA = json.dumps({"rank": 4, "alpha": 8.0, "seed": 1, "tiers": ["edge", "device"], "freeze_a": False})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle("qwen3_moe", tmp_path_factory.mktemp("train"))[1]


@pytest.fixture(scope="module")
def training(bundle: Path) -> Iterator[TrainingProcess]:
    with TrainingProcess(bundle) as process:
        yield process


@pytest.fixture
def trainer(bundle: Path, training: TrainingProcess, tmp_path: Path) -> SiteTrainer:
    return made(bundle, training, tmp_path / "state")


def made(bundle: Path, training: TrainingProcess, state: Path, *names: str) -> SiteTrainer:
    edge, device = TierFolder.open(bundle, "edge"), TierFolder.open(bundle, "device")
    rng = np.random.default_rng(0)
    texts = {
        name: SiteText(rng.integers(0, 90, 2000), rng.integers(0, 90, 300)) for name in names or ("clinic",)
    }
    return SiteTrainer(
        edge, device, texts, lambda gradients: RemoteCore(training.address, edge.manifest, gradients), state
    )


def describe(trainer: SiteTrainer, **changes: Any) -> tuple[Record, Arrays]:
    answer = trainer.answer({"action": "describe", "lora": LORA, "data": b""} | changes)
    shapes = {name: tuple(shape) for name, shape in json.loads(answer["shapes"]).items()}
    return answer, unpack(answer["data"], shapes, "fp32")


def task(factors: Arrays, digest: str, number: int = 1, **changes: Any) -> Record:
    data = pack(factors, "fp32")
    return {
        "action": "train",
        "run": "run",
        "round": number,
        "acknowledged": number - 1,
        "serving_digest": digest,
        "base": hashlib.sha256(data).hexdigest(),
        "update": "int8",
        "seed": 5,
        "sequences": 2,
        "length": 12,
        "evaluate": 2,
        "gradients": "int8",
        "lora": LORA,
        "training": json.dumps(
            {"steps": 3, "learning_rate": 1e-2, "total_steps": 30, "offset": 3 * (number - 1)}
        ),
        "data": data,
    } | changes


def test_a_round_sends_what_the_factors_moved_by_and_counts_its_bytes(trainer: SiteTrainer) -> None:
    described, initial = describe(trainer)
    assert described["site"] == "clinic"
    answer = trainer.answer(task(initial, described["serving_digest"]))
    update = unpack(answer["data"], shapes_of(initial), "int8")
    assert all(array.any() for name, array in update.items() if name.endswith("lora_B"))
    # 3 batches to train and 2 to evaluate, of 2 sequences of 12 rows in int8 with the first 4 in bf16.
    assert answer["rows_up"] >= 5 * 2 * (4 * 2 * 64 + 8 * 68)
    assert answer["gradients_up"] >= 3 * 2 * (4 * 2 * 64 + 8 * 68)
    assert answer["heldout"] > 0
    assert answer["loss"] > 0


def test_a_trainer_that_was_killed_takes_the_same_steps_again(
    bundle: Path, training: TrainingProcess, tmp_path: Path
) -> None:
    first = made(bundle, training, tmp_path / "one")
    described, initial = describe(first)
    request = task(initial, described["serving_digest"])
    before = first.answer(request)
    # Another life without the first one's disk, and a third that finds the answer there.
    other = made(bundle, training, tmp_path / "two").answer(request)
    kept = made(bundle, training, tmp_path / "one").answer(request)
    assert before["data"] == other["data"] == kept["data"]
    assert before["heldout"] == kept["heldout"]


def test_rounds_after_another_run_on_the_same_trainer_are_the_same(
    trainer: SiteTrainer, tmp_path: Path
) -> None:
    described, initial = describe(trainer)
    digest = described["serving_digest"]
    one = trainer.answer(task(initial, digest, run="one"))
    moved = {name: array + np.float32(0.1) for name, array in initial.items()}
    trainer.answer(task(moved, digest, run="between", seed=9))
    other = trainer.answer(task(initial, digest, run="other"))
    assert one["data"] == other["data"]


def test_evaluation_leaves_nothing_behind(trainer: SiteTrainer) -> None:
    described, initial = describe(trainer)
    request = task(initial, described["serving_digest"])
    first = trainer.answer(request | {"action": "evaluate"})
    trained = trainer.answer(request)
    assert first["heldout"] == trained["heldout"]
    assert first["gradients_up"] == 0


def test_with_a_frozen_only_b_travels(trainer: SiteTrainer) -> None:
    lora = json.dumps(json.loads(LORA) | {"freeze_a": True})
    described, initial = describe(trainer, lora=lora)
    answer = trainer.answer(task(initial, described["serving_digest"], lora=lora))
    only = {name: shape for name, shape in shapes_of(initial).items() if name.endswith("lora_B")}
    assert unpack(answer["data"], only, "int8")


def test_with_the_device_alone_no_gradient_crosses_and_rows_cross_once(trainer: SiteTrainer) -> None:
    lora = json.dumps(json.loads(LORA) | {"tiers": ["device"]})
    described, initial = describe(trainer, lora=lora)
    digest = described["serving_digest"]
    first = trainer.answer(task(initial, digest, lora=lora, sequences=8, length=200))
    second = trainer.answer(task(initial, digest, 2, lora=lora, sequences=8, length=200))
    assert first["gradients_up"] == first["gradients_down"] == 0
    assert first["rows_up"] > 0
    # Nine pieces of 200 tokens: the second round finds all of them in the site's cache.
    assert second["rows_up"] == 0


def test_rows_kept_in_another_precision_do_not_change_a_round(
    bundle: Path, training: TrainingProcess, tmp_path: Path
) -> None:
    lora = json.dumps(json.loads(LORA) | {"tiers": ["device"]})
    sent = []
    for name in ("fresh", "used"):
        trainer = made(bundle, training, tmp_path / name)
        described, initial = describe(trainer, lora=lora)
        request = task(initial, described["serving_digest"], lora=lora, sequences=8, length=200)
        if name == "used":
            settings = json.loads(request["training"]) | {"precision": "bf16"}
            trainer.answer(request | {"run": "before", "training": json.dumps(settings)})
        sent.append(trainer.answer(request)["data"])
    assert sent[0] == sent[1]


def test_a_late_round_does_not_change_those_after_it(
    bundle: Path, training: TrainingProcess, tmp_path: Path
) -> None:
    sent = []
    for name, rounds in (("in-order", [(1, 0), (3, 1), (4, 3)]), ("late", [(1, 0), (3, 1), (2, 0), (4, 3)])):
        trainer = made(bundle, training, tmp_path / name)
        described, initial = describe(trainer)
        answers = {
            number: trainer.answer(task(initial, described["serving_digest"], number, acknowledged=taken))
            for number, taken in rounds
        }
        sent.append([answers[number]["data"] for number in (1, 3, 4)])
    assert sent[0] == sent[1]


def test_a_round_that_is_over_is_not_trained(trainer: SiteTrainer) -> None:
    described, initial = describe(trainer)
    request = task(initial, described["serving_digest"])
    with pytest.raises(DeadlineExceeded, match="round 1 was over before this site had time for it"):
        trainer.answer(request | {"expires": time.monotonic() - 1})
    kept = trainer.answer(request | {"expires": time.monotonic() + 600})
    # An answer that is there already is worth sending at any time.
    assert trainer.answer(request | {"expires": time.monotonic() - 1})["data"] == kept["data"]


def test_checkpointing_is_a_setting_of_the_run_and_changes_no_bit(
    bundle: Path, training: TrainingProcess, tmp_path: Path
) -> None:
    sent = []
    for checkpointing in (False, True):
        trainer = made(bundle, training, tmp_path / str(checkpointing))
        described, initial = describe(trainer)
        request = task(initial, described["serving_digest"])
        settings = json.loads(request["training"]) | {"checkpointing": checkpointing}
        sent.append(trainer.answer(request | {"training": json.dumps(settings)})["data"])
        assert trainer._model is not None
        assert {shard.checkpointing for shard in trainer._model.shards} == {checkpointing}
    assert sent[0] == sent[1]


def test_sites_of_a_simulation_share_a_trainer_and_differ(
    bundle: Path, training: TrainingProcess, tmp_path: Path
) -> None:
    trainer = made(bundle, training, tmp_path / "state", "b", "a")
    described, initial = describe(trainer, partition=0)
    assert [describe(trainer, partition=number)[0]["site"] for number in range(3)] == ["a", "b", "a"]
    answers = [
        trainer.answer(task(initial, described["serving_digest"], partition=number)) for number in range(2)
    ]
    assert answers[0]["data"] != answers[1]["data"]
    with pytest.raises(InvalidRequest, match="for a simulation only"):
        describe(trainer)


def test_a_task_that_makes_no_sense_is_refused(trainer: SiteTrainer) -> None:
    described, initial = describe(trainer)
    digest = described["serving_digest"]
    with pytest.raises(DigestMismatch, match="the run is about eeee"):
        trainer.answer(task(initial, "e" * 64))
    with pytest.raises(InvalidRequest, match="damaged on the way"):
        trainer.answer(task(initial, digest, base="0" * 64))
    with pytest.raises(InvalidRequest, match="the task's length"):
        trainer.answer(task(initial, digest, length="long"))
    with pytest.raises(InvalidRequest, match="the task's run"):
        trainer.answer(task(initial, digest, run="../../elsewhere"))
    with pytest.raises(InvalidRequest, match="TrainSettings has no stepz"):
        trainer.answer(task(initial, digest, training='{"stepz": 1}'))
    with pytest.raises(InvalidRequest, match=r"names or shapes|claims"):
        trainer.answer(task({name: array[:1] for name, array in initial.items()}, digest))
    with pytest.raises(InvalidRequest, match="does not know the action 'read_text'"):
        trainer.answer(task(initial, digest, action="read_text"))
