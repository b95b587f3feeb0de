"""The planner: cuts, what tiers hold, what crosses links, and what is predicted."""

from __future__ import annotations

import json
import re
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.checkpoints import generate
from tests.published import DEEPSEEK_V3, LLAMA_3_1_8B, QWEN3_30B_A3B
from trifold.cloud.split.command_plan import plan as command
from trifold.cloud.split.cuts import nearest_cuts
from trifold.cloud.split.plan import Measure, plan
from trifold.cloud.split.profiles import TierProfiles
from trifold.cloud.split.split import split
from trifold.shared.bundle.folder import TierFolder
from trifold.shared.bundle.manifest import TIERS, CodecName, Cuts, Quantization
from trifold.shared.errors import ConfigError, InvalidRequest, PromptTooLong
from trifold.shared.model.checkpoint import Checkpoint
from trifold.shared.model.families.registry import family_of
from trifold.shared.model.fields import Fields
from trifold.shared.model.spec import ModelSpec
from trifold.shared.runtime.shard import Shard

V3 = family_of(Fields(DEEPSEEK_V3)).spec()
QWEN = family_of(Fields(QWEN3_30B_A3B)).spec()
LLAMA = family_of(Fields(LLAMA_3_1_8B)).spec()
SHORT = LLAMA.model_copy(update={"max_positions": 100})

SMALLER = {
    "vocab_size": 512,
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "quantization_config": None,
}
"""Sizes that a test can split, for any family."""

PROFILES = """
[cloud]
memory = "80GB"
flops = 100e12
bandwidth = "2TB"
[edge]
memory = "24GB"
flops = 10e12
bandwidth = "100GB"
[device]
memory = "8GB"
flops = 1e12
bandwidth = "50GB"
[device_edge]
bandwidth = "80Mbit"
rtt = 0.002
[edge_cloud]
bandwidth = "1Gbit"
rtt = 0.03
"""


@pytest.fixture
def tiers(tmp_path: Path) -> Path:
    path = tmp_path / "tiers.toml"
    path.write_text(PROFILES)
    return path


WEIGHTS = st.integers(0, 1000)


@given(
    edge=WEIGHTS,
    layers=st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    device=WEIGHTS,
    ratio=st.tuples(WEIGHTS, WEIGHTS, WEIGHTS).filter(lambda ratio: sum(ratio) > 0),
)
@settings(max_examples=300, deadline=None)
def test_no_other_cuts_come_nearer_to_the_ratio(
    edge: int, layers: list[int], device: int, ratio: tuple[int, int, int]
) -> None:
    wanted = [share / sum(ratio) * 100 for share in ratio]
    whole = edge + sum(layers) + device

    def farthest(first: int, stop: int) -> float:
        held = sum(layers[first:stop]), edge + sum(layers[:first]), sum(layers[stop:]) + device
        return max(abs(part / whole * 100 - share) for part, share in zip(held, wanted, strict=True))

    chosen = nearest_cuts(edge, layers, device, (wanted[0], wanted[1], wanted[2]))
    assert 0 <= chosen.edge < chosen.cloud <= len(layers)
    places = range(len(layers) + 1)
    best = min(farthest(first, stop) for first, stop in product(places, places) if first < stop)
    assert farthest(chosen.edge, chosen.cloud) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("by", ["params", "active", "flops", "bytes"])
@pytest.mark.parametrize("spec", [V3, QWEN, LLAMA], ids=lambda spec: spec.family)
def test_a_large_model_comes_within_three_points_of_the_ratio(spec: ModelSpec, by: Measure) -> None:
    result = plan(spec, by=by)
    for tier, wanted in zip(TIERS, (70, 20, 10), strict=True):
        assert result.tiers[tier].share == pytest.approx(wanted, abs=3)
    assert sum(part.share for part in result.tiers.values()) == pytest.approx(100)


@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
@pytest.mark.parametrize("spec", [V3, LLAMA], ids=lambda spec: spec.family)
def test_the_tiers_together_hold_the_model(spec: ModelSpec, quantization: Quantization) -> None:
    result = plan(spec, quantization=quantization)
    assert sum(part.parameters for part in result.tiers.values()) == result.parameters
    assert result.tiers["edge"].stop == result.tiers["cloud"].first
    assert result.tiers["cloud"].stop == result.tiers["device"].first
    assert result.tiers["device"].stop == len(spec.layers)
    # Between the bare bits and those with one fp32 scale to 32 values, and little that is not quantized or
    # that latent attention adds by absorbing its expansion.
    width = {"int8": (1, 1.18), "int4": (0.5, 0.7), "none": (4, 4.16)}[quantization]
    stored = sum(part.weight_bytes for part in result.tiers.values())
    assert width[0] <= stored / result.parameters <= width[1]


@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
@pytest.mark.parametrize("base", [DEEPSEEK_V3, QWEN3_30B_A3B, LLAMA_3_1_8B], ids=itemgetter("model_type"))
def test_the_planned_bytes_are_those_of_the_shards(
    base: dict[str, Any], quantization: Quantization, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(generate({**base, **SMALLER}, tmp_path / "checkpoint"))
    planned = plan(checkpoint.spec, quantization=quantization)
    manifest = split(checkpoint, planned.cuts, tmp_path / "bundle", quantization=quantization)
    for tier in TIERS:
        written = manifest.serving.files[tier]["weights.bin"].size
        assert planned.tiers[tier].weight_bytes == pytest.approx(written, rel=0.01)
        shard = Shard.load(TierFolder.open(tmp_path / "bundle", tier), threads=1)
        kv_bytes = shard.cache_bytes(1001) - shard.cache_bytes(1000)
        assert planned.tiers[tier].kv_bytes == kv_bytes


def test_a_tied_head_counts_on_edge_and_device() -> None:
    tied = LLAMA.model_copy(update={"tied_head": True})
    vocabulary = tied.vocab * tied.hidden
    result = plan(tied)
    assert sum(part.parameters for part in result.tiers.values()) == result.parameters + vocabulary


def test_a_device_with_attention_is_sent_every_row_of_the_prompt_and_one_without_only_the_last() -> None:
    row = 4 + V3.hidden
    every = plan(V3, ratio=(70, 20, 10), prompt=100).links["edge_cloud"]
    last = plan(V3, ratio=(80, 20, 0), prompt=100).links["edge_cloud"]
    assert every.prompt_down == every.prompt_up == 4 * 2 * V3.hidden + 96 * row
    assert last.prompt_down == last.token_down == row


@pytest.mark.parametrize(("codec", "size"), [("none", 4 * 7168), ("bf16", 2 * 7168), ("int8", 4 + 7168)])
def test_a_token_takes_one_row_of_the_codec_on_each_link(codec: CodecName, size: int) -> None:
    links = plan(V3, codec=codec).links
    assert (links["edge_cloud"].token_up, links["edge_cloud"].token_down) == (size, size)
    assert links["device_edge"].token_down == size
    assert links["device_edge"].token_up == 3  # an id below 129,280 as a varint


def test_predictions_follow_the_roofline(tiers: Path) -> None:
    result = plan(LLAMA, prompt=512, context=2048, profiles=TierProfiles.load(tiers))
    split, cloud, edge, device = result.predictions
    assert [each.place for each in result.predictions] == ["split", "cloud", "edge", "device"]
    # By hand: 8.03e9 weights less 0.525e9 of the embedding in int8 with scales, 2048 · 131,072 bytes of KV.
    read = (8.03026e9 - 0.52534e9) * 1.125 + 2048 * 2 * 8 * 128 * 4 * 2 * 16
    assert cloud.token == pytest.approx(read / 2e12, rel=0.01)
    assert edge.token == pytest.approx(read / 100e9, rel=0.01)
    assert device.token == pytest.approx(read / 50e9, rel=0.01)
    operations = 512 * (2 * 7.505e9 + 256 * 32 * 2 * 2 * 32 * 128)
    assert device.first_token == pytest.approx(operations / 1e12, rel=0.01)
    assert cloud.first_token == pytest.approx(0.032 + operations / 100e12, rel=0.01)
    # The split pays both round trips and three rows a token besides computing.
    assert split.token > 0.032 + 2 * 4100 / 125e6 + 4100 / 10e6
    assert (cloud.fits, edge.fits, device.fits) == (True, True, False)


def test_not_splitting_is_advised_where_one_tier_would_be_faster_and_has_the_room(tiers: Path) -> None:
    profiles = TierProfiles.load(tiers)
    (advice,) = plan(LLAMA, profiles=profiles).advice
    assert "Not splitting would be faster" in advice
    assert "cloud" in advice
    assert "token ids and text" in advice


def test_splitting_is_not_advised_against_where_no_tier_has_room_for_the_whole(tiers: Path) -> None:
    tiers.write_text(PROFILES.replace("80GB", "7GB").replace("24GB", "7GB").replace("8GB", "7GB"))
    result = plan(LLAMA, profiles=TierProfiles.load(tiers))
    assert result.predictions[0].fits
    assert result.advice == ()


def test_a_tier_without_room_for_its_part_is_named(tiers: Path) -> None:
    advice = plan(V3, profiles=TierProfiles.load(tiers)).advice
    assert [line.split("'")[0] for line in advice] == ["The cloud", "The edge", "The device"]


@pytest.mark.parametrize("ratio", ["70/20", "a/b/c", "0/0/0", "-1/50/51", "1/nan/1", "inf/1/1", ""])
def test_a_ratio_that_is_none_is_refused(ratio: str, tmp_path: Path) -> None:
    result = run(tmp_path, "--ratio", ratio)
    assert isinstance(result.exception, InvalidRequest)


@pytest.mark.parametrize("prompt", [0, -5, 2000])
def test_a_prompt_that_does_not_fit_the_context_is_refused(prompt: int) -> None:
    with pytest.raises(InvalidRequest, match=str(prompt)):
        plan(LLAMA, prompt=prompt, context=1024)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[edge]", "[egde]", "edge"),
        ('memory = "24GB"', "", "edge.memory"),
        ("rtt = 0.03", "rtt = -1", "edge_cloud.rtt: -1 is not a time"),
        ("flops = 1e12", "flops = 'fast'", "device.flops: 'fast' is not a number"),
        ('"1Gbit"', '"1Gb"', "edge_cloud.bandwidth: '1Gb' is not a bandwidth"),
        ('"80GB"', '"-1GB"', "cloud.memory: '-1GB' is not a size"),
        ('"80GB"', "true", "cloud.memory: True is not a size"),
        ("[cloud]", "[cloud", "TOML"),
    ],
)
def test_a_tiers_file_that_makes_no_sense_is_refused_by_key(
    tiers: Path, old: str, new: str, named: str
) -> None:
    tiers.write_text(PROFILES.replace(old, new))
    with pytest.raises(ConfigError, match=named):
        TierProfiles.load(tiers)


def test_all_that_is_wrong_with_a_tiers_file_is_said_at_once(tiers: Path) -> None:
    text = PROFILES.replace("[edge]", "[egde]").replace("memory = ", "memroy = ", 1).replace("rtt = 0.03", "")
    tiers.write_text(text)
    with pytest.raises(ConfigError) as refused:
        TierProfiles.load(tiers)
    assert [line.strip() for line in refused.value.message.splitlines()[1:]] == [
        "cloud.memory is missing",
        "cloud.memroy is unknown: did you mean memory?",
        "[edge] is missing",
        "edge_cloud.rtt is missing",
        "[egde] is unknown: did you mean edge?",
    ]


@pytest.mark.parametrize(
    ("bandwidth", "rtt"),
    [('"1Gbit"', '"30ms"'), ('"1 Gbit/s"', '"0.03 s"'), ('"125MB"', "30e-3"), ('"0.125GB/s"', '"3e4us"')],
)
@pytest.mark.parametrize("table", ["edge_cloud", "edge"])
def test_bandwidths_are_in_bits_or_bytes_and_times_in_any_unit(
    table: str, bandwidth: str, rtt: str, tiers: Path
) -> None:
    tiers.write_text(PROFILES.replace('"1Gbit"\nrtt = 0.03', f"{bandwidth}\nrtt = {rtt}"))
    tiers.write_text(tiers.read_text().replace('"100GB"', bandwidth))
    profiles = TierProfiles.load(tiers)
    assert profiles.edge_cloud.bandwidth == profiles.edge.bandwidth == pytest.approx(125e6)
    assert profiles.edge_cloud.rtt == pytest.approx(0.03)


def test_the_example_of_the_page_on_planning_is_that_of_these_tests(tiers: Path, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "planning.md"
    (example,) = re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "example.toml").write_text(example)
    assert TierProfiles.load(tmp_path / "example.toml") == TierProfiles.load(tiers)


def test_a_plan_that_does_not_fit_its_tiers_is_printed_and_fails(tiers: Path, tmp_path: Path) -> None:
    for format_ in ((), ("--json",)):
        result = run(tmp_path, "--tiers", str(tiers), *format_)
        assert result.exit_code == 1
        assert "The edge's part needs 151.98 GB, and it has 24.00 GB." in " ".join(result.stdout.split())


def test_small_sizes_and_fast_tiers_are_printed_in_fitting_units(tiers: Path, tmp_path: Path) -> None:
    tiers.write_text(PROFILES.replace("8GB", "2kB").replace('"2TB"', "4e19").replace("100e12", "1e19"))
    output = " ".join(run(tmp_path, "--tiers", str(tiers)).stdout.split())
    assert "and it has 2.00 kB." in output
    assert "e+" not in output


def test_of_equally_fast_tiers_the_one_nearest_to_the_user_is_advised(tmp_path: Path) -> None:
    machine = {"memory": "80GB", "flops": 1e12, "bandwidth": "50GB"}
    link = {"bandwidth": "1Gbit", "rtt": "1ms"}

    def advice(device: str, edge: str) -> str:
        profiles = TierProfiles.model_validate(
            {
                "cloud": machine,
                "edge": machine | {"memory": edge},
                "device": machine | {"memory": device},
                "device_edge": link,
                "edge_cloud": link,
            }
        )
        (line,) = plan(LLAMA, profiles=profiles).advice
        return line

    assert "fits the device" in advice(device="80GB", edge="80GB")
    assert "fits the edge" in advice(device="2GB", edge="80GB")
    assert "fits the cloud" in advice(device="2GB", edge="4GB")


def test_a_context_above_the_positions_of_the_model_is_refused_and_the_default_is_not() -> None:
    with pytest.raises(PromptTooLong, match="5000 does not fit the 100 positions"):
        plan(SHORT, context=5000)
    assert (plan(SHORT).context, plan(SHORT).prompt) == (100, 100)


def test_shares_that_whole_layers_cannot_reach_are_told_in_one_line() -> None:
    few = LLAMA.model_copy(update={"layers": LLAMA.layers[:2]})
    (line,) = plan(few, ratio=(80, 10, 10)).advice
    assert line == (
        "Whole layers come no nearer to the ratio: "
        "cloud 29 % instead of 80 %, edge 35 % instead of 10 %, device 35 % instead of 10 %."
    )
    assert plan(few, cuts=Cuts(edge=0, cloud=2)).advice == ()
    assert plan(LLAMA, ratio=(80, 10, 10)).advice == ()


def test_given_cuts_are_planned_whatever_the_ratio(tmp_path: Path) -> None:
    result = run(tmp_path, "--cuts", "3/60", "--ratio", "10/10/80")
    assert "Cuts at layers 3 and 60" in result.stdout
    assert "asked for" not in result.stdout
    assert "layer 60, norm, head" in result.stdout
    assert isinstance(run(tmp_path, "--cuts", "3").exception, InvalidRequest)
    assert isinstance(run(tmp_path, "--cuts", "3/62").exception, InvalidRequest)


def test_a_plan_without_tiers_says_how_to_get_times(tmp_path: Path) -> None:
    assert run(tmp_path).stdout.endswith("Times: give --tiers FILE (docs/planning.md)\n")


def test_the_command_prints_cuts_shares_memory_links_and_predictions(tmp_path: Path, tiers: Path) -> None:
    output = run(tmp_path, "--tiers", str(tiers)).stdout
    for words in ("671.03 B", "layers 14–54", "embedding", "70.3 %", "549.95 GB", "edge – cloud", "split"):
        assert words in output


def test_the_command_prints_json_for_machines(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path, "--json", "--by", "active", "--quant", "int4").stdout)
    assert found["by"] == "active"
    assert found["cuts"].keys() == {"edge", "cloud"}
    assert found["tiers"]["cloud"]["weight_bytes"] > 0


def run(folder: Path, *arguments: str) -> Result:
    """`trifold plan` on DeepSeek-V3, of which only config.json is there."""
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(folder), *arguments])
