"""`trifold doctor` as a whole, and what it tells of the machine and of what lies there."""

from __future__ import annotations

import asyncio
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort
import pytest

from tests.edge.examinations import MAIN, doctor, fault, found, running_authority
from tests.edge.jetsons import put
from tests.identities import enrolled
from tests.tiers import running_core
from trifold.edge.doctor import processor, providers
from trifold.edge.doctor.bundle import BUNDLE
from trifold.edge.doctor.check import Check
from trifold.edge.doctor.command import CHECKS
from trifold.edge.doctor.disk import DISK
from trifold.edge.doctor.finding import Finding, ok
from trifold.edge.doctor.memory import MEMORY
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.processor import PROCESSOR
from trifold.edge.doctor.providers import PROVIDERS
from trifold.edge.doctor.trial import _PROBE
from trifold.edge.doctor.versions import VERSIONS

ROOT = Path(__file__).parents[2]


async def test_a_site_that_is_well_has_no_fault_and_everything_was_looked_at(
    bundle: Path, tmp_path: Path
) -> None:
    async with running_authority(tmp_path / "authority") as server:
        nodes = [
            enrolled(server.authority, tmp_path / role, role, address=server.renewal)
            for role in ("core", "edge")
        ]
        async with running_core(bundle, tls=nodes[0]) as core:
            result = await doctor("--bundle", bundle, "--core", core.address, "--tls", nodes[1])
            assert len(core.service.table) == 0
    assert result.code == 0
    assert [check.name for check in CHECKS] == list(dict.fromkeys(name for name, _ in result.findings))
    for check in ("bundle", "numerics", "certificate", "authority", "clock"):
        assert result.verdicts(check) == {"ok"}
    # A busy machine is as slow as a core that is far away.
    for check in ("core", "link"):
        assert result.verdicts(check) <= {"ok", "warning"}
    assert "role edge: may call CoreService" in result.of("certificate")[1].detail
    assert "it serves this bundle" in result.of("core")[0].detail


async def test_a_machine_alone_is_examined_offline_without_anything_of_other_tiers(tmp_path: Path) -> None:
    lacking = ("torch", "transformers", "flwr", "onnx_ir", "fastapi")
    start = f"import sys; sys.modules.update(dict.fromkeys({lacking})); from {MAIN[-1]} import main; main()"
    result = await doctor(command=[sys.executable, "-c", start], TMPDIR=str(tmp_path))
    assert result.code == 0
    for check in ("bundle", "numerics", "engines", "certificate", "authority", "clock", "core", "link"):
        assert result.verdicts(check) == {"skipped"}
    assert "a small graph: 2 nodes on CPU" in result.of("providers")[-1].detail
    # Neither the trials of the disk nor ONNX Runtime's telemetry, which is off, leave anything behind.
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


async def test_people_get_a_table_with_what_to_do(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(*MAIN, "doctor", "--bundle", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": "200"},
    )
    out, _ = await process.communicate()
    lines = out.decode().splitlines()
    [at] = [number for number, line in enumerate(lines) if line.startswith("bundle       fault")]
    assert "is this a bundle?" in lines[at]
    assert "→ copy the folder again" in lines[at + 1]
    assert lines[-1].startswith("1 fault, ")
    assert process.returncode == 1


async def test_the_settings_of_the_edge_are_those_of_the_doctor(bundle: Path, tmp_path: Path) -> None:
    put(tmp_path / "site.toml", f'[edge]\nbundle = "{bundle}"\nkv_memory = "900GiB"\n')
    result = await doctor("--config", tmp_path / "site.toml", "--core", "127.0.0.1:1")
    assert result.verdicts("bundle") == {"ok"}
    [short] = [finding for finding in result.of("memory") if finding.verdict == "warning"]
    assert "caches may take 921600 MiB" in short.detail
    assert "127.0.0.1:1" in result.fault("core").detail


@pytest.mark.parametrize("part", [".", "edge"])
async def test_a_damaged_file_is_named_and_its_shard_is_not_run(
    part: str, bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    weights = copy / "edge/weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    result = await doctor("--bundle", copy / part)
    assert str(weights) in result.fault("bundle").detail
    assert "copy the folder again" in result.fault("bundle").remedy
    assert "edge shard" not in "".join(finding.detail for finding in result.of("numerics"))
    assert "edge shard" not in "".join(finding.detail for finding in result.of("providers"))


def test_tiers_of_different_bundles_in_one_folder_are_a_fault(
    bundle: Path, attending_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle / "edge", tmp_path / "edge")
    shutil.copytree(attending_bundle / "device", tmp_path / "device")
    assert "from different bundles" in fault(BUNDLE, Patient(bundle=tmp_path)).detail


def _tmpfs(options: str, fill: str) -> list[str]:
    """A shell that gives the command behind it a file system of its own as TMPDIR, where that is allowed."""
    mount = f'mount -t tmpfs -o {options} tmpfs "$TMPDIR" && {fill} && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]


def _mounts(tmp_path: Path) -> bool:
    command = [*_tmpfs("size=64k", "true"), "true"]
    try:
        return (
            subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, check=False).returncode == 0
        )
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "fill", "told", "remedy"),
    [
        ("size=256k", "true", "No space left on device", "the disk is full"),
        ("size=64m", 'mount -o remount,ro "$TMPDIR"', "Read-only file system", "can only be read"),
    ],
)
async def test_a_disk_that_takes_nothing_is_a_fault(
    tmp_path: Path, options: str, fill: str, told: str, remedy: str
) -> None:
    if not _mounts(tmp_path):
        pytest.skip("a small file system of one's own cannot be mounted here")
    result = await doctor(command=[*_tmpfs(options, fill), *MAIN], TMPDIR=str(tmp_path))
    assert told in result.fault("disk").detail
    assert remedy in result.fault("disk").remedy


def test_a_folder_that_is_not_there_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert "No such file or directory" in fault(DISK, Patient()).detail


def test_too_little_memory_for_a_shard_is_a_fault(bundle: Path, tmp_path: Path) -> None:
    put(tmp_path / "proc/meminfo", "MemTotal:  2048 kB\nMemAvailable:   16 kB\n")
    verdicts = [finding.verdict for finding in found(MEMORY, Patient(bundle=bundle / "edge", root=tmp_path))]
    assert verdicts == ["fault"]


def test_the_limit_of_a_container_counts(bundle: Path, tmp_path: Path) -> None:
    put(tmp_path / "proc/meminfo", "MemAvailable: 8388608 kB\n")
    patient = Patient(bundle=bundle / "edge", root=tmp_path)
    put(tmp_path / "sys/fs/cgroup/memory.max", "max\n")
    put(tmp_path / "sys/fs/cgroup/memory.current", "4096\n")
    assert "8192 MiB available" in found(MEMORY, patient)[0].detail
    put(tmp_path / "sys/fs/cgroup/memory.max", "8192\n")
    assert found(MEMORY, patient)[0].verdict == "fault"
    assert found(MEMORY, replace(patient, bundle=None))[0].verdict == "ok"


def test_a_cpu_without_the_instructions_that_count_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "instructions", lambda: "aarch64")
    [finding] = found(PROCESSOR)
    assert finding.verdict == "warning"
    assert "without asimddp" in finding.detail


def test_a_package_that_does_not_fit_is_a_fault_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "__version__", "1.23.2")
    [finding] = [finding for finding in found(VERSIONS) if finding.verdict == "fault"]
    assert "onnxruntime is 1.23.2" in finding.detail
    assert finding.remedy.startswith("pip install 'onnxruntime")


def test_two_onnxruntimes_over_each_other_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "onnxruntime_gpu-1.31.1.dist-info/METADATA", "Name: onnxruntime-gpu\nVersion: 1.31.1\n")
    put(tmp_path / "onnxruntime_gpu-1.31.1.dist-info/top_level.txt", "onnxruntime\n")
    monkeypatch.syspath_prepend(tmp_path)
    [finding] = [finding for finding in found(VERSIONS) if finding.verdict == "warning"]
    assert finding.remedy.startswith("pip uninstall onnxruntime onnxruntime-gpu")


def test_a_provider_that_is_listed_and_does_not_come_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
    cuda, cpu = found(PROVIDERS)
    assert (cuda.verdict, cpu.verdict) == ("warning", "ok")
    assert "CUDAExecutionProvider: it does not come up" in cuda.detail
    assert "cuDNN" in cuda.remedy


@pytest.mark.parametrize(
    ("trial", "told"),
    [
        ("import os; os.abort()", "it ended the process that tried it (SIGABRT)"),
        (
            "import sys; sys.exit('error: libcublasLt.so.13: cannot open shared object file: No such file')",
            "it does not come up: libcublasLt.so.13 is missing",
        ),
        (
            'print(\'[{"graph": "a small graph", "nodes": {"B": 2}, "error": NaN, "seconds": 1}]\')',
            "wrong results",
        ),
        (
            'print(\'[{"graph": "a small graph", "nodes": {"B": 2}, "error": 0, "seconds": 1}]\')',
            "it has taken no node",
        ),
    ],
)
def test_a_provider_that_fails_in_its_own_way_does_not_end_the_examination(
    trial: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_trial.py").write_text(trial)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(providers, "_TRIAL", "failing_trial")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["AExecutionProvider"])
    [finding] = found(PROVIDERS)
    assert finding.verdict == "warning"
    assert told in finding.detail


def test_a_check_that_breaks_is_a_fault_and_the_others_are_heard() -> None:
    def examine(_: Patient) -> list[Finding]:
        raise ZeroDivisionError("by nothing")

    [finding] = found(Check("broken", examine, "mend it"))
    assert finding.verdict == "fault"
    assert "ZeroDivisionError: by nothing" in finding.detail
    assert found(Check("whole", lambda _: [ok("well")], "mend it")) == [ok("well")]


def test_the_small_graph_is_the_one_that_its_script_writes() -> None:
    assert runpy.run_path(str(ROOT / "edge/probe.py"))["graph"]() == _PROBE.read_bytes()
