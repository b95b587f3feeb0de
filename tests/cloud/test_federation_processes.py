"""A federation as it is deployed: SuperLink, SuperNodes, training process, trainers, each a process."""

from __future__ import annotations

from pathlib import Path

from trifold.cloud.federation.checkpoint import Checkpoint
from trifold.cloud.federation.metrics import read
from trifold.cloud.split.split import split
from trifold.device.demo.federated.federation import Federation
from trifold.shared.bundle.factors import LoraFactors
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint as Model

ROOT = Path(__file__).parent.parent.parent
APP = ROOT / "deploy" / "flower"
TEXTS = {"code": ROOT / "shared", "prose": ROOT / "docs"}
SMALL = ("local.steps=2", "local.sequences=2", "local.length=32", "local.evaluate=1")
SETTINGS = ("rounds=2", "quorum=2", *SMALL)


def test_two_sites_train_an_adapter_through_flower(tmp_path: Path) -> None:
    bundle, folder = tmp_path / "bundle", tmp_path / "run"
    split(Model.open(ROOT / "models" / "trifold-nano"), Cuts(edge=1, cloud=6), bundle, train=True)
    with Federation(tmp_path / "federation", bundle, TEXTS, APP) as federation:
        told = (word for item in SETTINGS for word in ("--set", item))
        assert "2 of 2 rounds done" in federation.federate("run", str(folder), *told)
    factors = LoraFactors.load(folder / "adapter.safetensors")
    assert any(array.any() for name, array in factors.tensors.items() if name.endswith("lora_B"))
    last = Checkpoint.last(folder / "checkpoints")
    assert last is not None
    assert last.taken == {"code": 2, "prose": 2}
    events = list(read(folder))
    for row in (event for event in events if event["event"] == "round"):
        for report in row["sites"].values():
            assert report["update_up"] <= 0.27 * report["update_down"]
    assert [event["event"] for event in events][-2:] == ["evaluation", "end"]
