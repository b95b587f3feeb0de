"""`trifold doctor` as its own process, against real services, and its checks of the machine by themselves."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from time import time
from typing import NamedTuple

import onnxruntime as ort
import pytest

from tests.edge.jetsons import put
from tests.identities import HOST, TENANT, Forger, enrolled
from tests.network.proxy import Proxy
from tests.tiers import running_core
from trifold.cloud.authority.authority import Authority
from trifold.cloud.authority.service import AuthorityServer
from trifold.edge.doctor import processor, providers
from trifold.edge.doctor.authority import AUTHORITY
from trifold.edge.doctor.bundle import BUNDLE
from trifold.edge.doctor.certificate import CERTIFICATE
from trifold.edge.doctor.check import Check
from trifold.edge.doctor.command import CHECKS
from trifold.edge.doctor.core import CORE
from trifold.edge.doctor.disk import DISK
from trifold.edge.doctor.finding import Finding, ok
from trifold.edge.doctor.link import Crossing, _told
from trifold.edge.doctor.memory import MEMORY
from trifold.edge.doctor.patient import Patient
from trifold.edge.doctor.processor import PROCESSOR
from trifold.edge.doctor.providers import PROVIDERS
from trifold.edge.doctor.trial import _PROBE
from trifold.edge.doctor.versions import VERSIONS
from trifold.shared import durable
from trifold.shared.identity.request import write_private
from trifold.shared.session import service as service_module

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-m", "trifold.shared.cli.main"]


class Result(NamedTuple):
    code: int
    findings: list[tuple[str, Finding]]

    def of(self, check: str) -> list[Finding]:
        return [finding for name, finding in self.findings if name == check]

    def verdicts(self, check: str) -> set[str]:
        return {finding.verdict for finding in self.of(check)}

    def fault(self, check: str) -> Finding:
        """The one fault of a check, which ends the command with 1 and says what to do."""
        assert self.code == 1
        [fault] = [finding for finding in self.of(check) if finding.verdict == "fault"]
        return fault


async def doctor(*arguments: str | Path, command: list[str] = MAIN, **variables: str) -> Result:
    """What `trifold doctor` finds."""
    process = await asyncio.create_subprocess_exec(
        *command,
        *("doctor", "--json", "--threads", "1"),
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | variables,
    )
    out, err = await process.communicate()
    assert out, err.decode()
    report = json.loads(out)
    findings = [(told.pop("check"), Finding(**told)) for told in report["findings"]]
    for _, finding in findings:
        assert bool(finding.remedy) == (finding.verdict in ("warning", "fault"))
    assert report["healthy"] == (process.returncode == 0)
    return Result(process.returncode or 0, findings)


def found(check: Check, patient: Patient | None = None) -> list[Finding]:
    return list(check.findings(patient or Patient()))


def fault(check: Check, patient: Patient) -> Finding:
    """The one fault that a check finds, with what to do."""
    [fault] = [finding for finding in found(check, patient) if finding.verdict == "fault"]
    assert fault.remedy
    return fault


@asynccontextmanager
async def running_authority(folder: Path) -> AsyncIterator[AuthorityServer]:
    Authority.init(folder, [HOST])
    server = AuthorityServer(Authority(folder, timedelta(days=1)), f"{HOST}:0", f"{HOST}:0")
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One that is not running."""
    Authority.init(tmp_path / "authority", [HOST])
    return Authority(tmp_path / "authority")


def forged(authority: Authority, folder: Path, *, begins: float, ends: float) -> Path:
    """An edge whose certificate holds from so many hours from now to so many."""
    made = Forger(authority).certificate([f"trifold://{TENANT}/edge/edge"], begins=begins, ends=ends)
    folder.mkdir()
    write_private(folder / "key.pem", made.key)
    durable.write(folder / "chain.pem", made.chain)
    durable.write(folder / "authority.pem", authority.root_pem)
    return folder


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
    for check in ("bundle", "numerics", "certificate", "authority", "clock", "core", "link"):
        assert result.verdicts(check) == {"ok"}
    assert "role edge: may call CoreService" in result.of("certificate")[1].detail
    assert "it serves this bundle" in result.of("core")[0].detail


async def test_a_machine_alone_is_examined_offline_without_anything_of_other_tiers(tmp_path: Path) -> None:
    lacking = ("torch", "transformers", "flwr", "onnx_ir", "fastapi")
    start = f"import sys; sys.modules.update(dict.fromkeys({lacking})); from {MAIN[-1]} import main; main()"
    result = await doctor(command=[sys.executable, "-c", start], TMPDIR=str(tmp_path))
    assert result.code == 0
    for check in ("bundle", "numerics", "certificate", "authority", "clock", "core", "link"):
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


async def test_a_core_that_is_not_there_is_a_fault(bundle: Path, unused_tcp_port: int) -> None:
    result = await doctor("--bundle", bundle, "--core", f"127.0.0.1:{unused_tcp_port}")
    fault = result.fault("core")
    assert fault.detail == f"nothing listens at 127.0.0.1:{unused_tcp_port}"
    assert "start the service" in fault.remedy
    assert (result.verdicts("clock"), result.verdicts("link")) == ({"skipped"}, {"skipped"})


def test_a_host_that_has_no_address_is_a_fault() -> None:
    assert "look up" in fault(CORE, Patient(core="core.invalid:50060", insecure=True)).detail


async def test_a_core_with_another_bundle_is_a_fault(bundle: Path, attending_bundle: Path) -> None:
    async with running_core(attending_bundle) as core:
        result = await doctor("--bundle", bundle / "edge", "--core", core.address)
    assert "sessions are refused" in result.fault("core").detail
    assert "copy this machine's part" in result.fault("core").remedy
    assert result.verdicts("link") == {"skipped"}


@pytest.mark.parametrize(
    ("ahead", "verdict"), [(-3600, "fault"), (3600, "fault"), (20, "warning"), (0.5, "ok")]
)
async def test_a_clock_that_is_not_the_cores_is_told(
    bundle: Path, ahead: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "time", lambda: time() - ahead)
    async with running_core(bundle) as core:
        result = await doctor("--core", core.address)
    [finding] = result.of("clock")
    assert finding.verdict == verdict
    assert ("ahead of the core" in finding.detail) == (ahead > 1)
    assert ("behind the core" in finding.detail) == (ahead < 0)
    assert ("timedatectl" in finding.remedy) == (verdict == "fault")


async def test_without_a_core_the_clock_is_compared_with_the_authoritys(tmp_path: Path) -> None:
    async with running_authority(tmp_path / "authority") as server:
        node = enrolled(server.authority, tmp_path / "edge", "edge", address=server.renewal)
        result = await doctor("--tls", node)
    assert [finding.detail for finding in result.of("clock")] == ["agrees with the authority's"]


async def test_a_certificate_that_ran_out_is_a_fault(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    edge = forged(authority, tmp_path / "edge", begins=-25, ends=-1)
    async with running_core(bundle, tls=enrolled(authority, tmp_path / "core", "core")) as core:
        result = await doctor("--tls", edge, "--core", core.address)
    assert "ran out 1 h 0 min ago" in result.fault("certificate").detail
    assert "trifold node enroll" in result.fault("certificate").remedy
    assert "is the certificate of this node good" in result.fault("core").remedy


def test_a_certificate_that_has_not_begun_points_at_the_clock(authority: Authority, tmp_path: Path) -> None:
    edge = forged(authority, tmp_path / "edge", begins=2, ends=26)
    assert "the clock here is behind" in fault(CERTIFICATE, Patient(tls=edge)).detail


def test_a_certificate_that_should_have_been_renewed_is_told(authority: Authority, tmp_path: Path) -> None:
    edge = forged(authority, tmp_path / "edge", begins=-20, ends=4)
    late = found(CERTIFICATE, Patient(tls=edge))[0]
    assert late.verdict == "warning"
    assert "trifold node renew" in late.remedy


def test_a_folder_that_is_no_nodes_is_a_fault(tmp_path: Path) -> None:
    assert "cannot be read" in fault(CERTIFICATE, Patient(tls=tmp_path)).detail


async def test_a_node_that_was_revoked_is_a_fault(tmp_path: Path) -> None:
    async with running_authority(tmp_path / "authority") as server:
        node = enrolled(server.authority, tmp_path / "edge", "edge", address=server.renewal)
        server.authority.register.revoke("edge")
        result = await doctor("--tls", node)
    assert "revoked" in result.fault("authority").detail


def test_an_authority_that_is_away_is_a_warning(authority: Authority, tmp_path: Path) -> None:
    node = enrolled(authority, tmp_path / "edge", "edge", address=f"{HOST}:1")
    assert [finding.verdict for finding in found(AUTHORITY, Patient(tls=node))] == ["warning"]


async def test_a_node_of_another_role_has_no_session_with_the_core(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    device = enrolled(authority, tmp_path / "device", "device")
    async with running_core(bundle, tls=enrolled(authority, tmp_path / "core", "core")) as core:
        result = await doctor("--tls", device, "--core", core.address, "--bundle", bundle)
    assert result.code == 0
    assert result.verdicts("core") == {"ok"}
    assert "this node is a device" in result.of("link")[0].detail


async def test_a_core_with_tls_and_a_doctor_without_are_told_apart_and_the_other_way_round(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    async with running_core(bundle, tls=enrolled(authority, tmp_path / "core", "core")) as core:
        assert "speaks TLS" in (await doctor("--core", core.address)).fault("core").detail
    edge = enrolled(authority, tmp_path / "edge", "edge")
    async with running_core(bundle) as core:
        result = await doctor("--core", core.address, "--tls", edge)
    assert "does not speak TLS" in result.fault("core").detail


@pytest.mark.parametrize(
    ("begins", "ends", "hosts", "told", "remedy"),
    [
        (-25.0, -1.0, [HOST], "and here it is", "set the clocks"),
        (1.0, 25.0, [HOST], "and here it is", "set the clocks"),
        (-1.0, 1.0, ["core.example.org"], "is for core.example.org, not for 127.0.0.1", "--host 127.0.0.1"),
    ],
)
async def test_what_is_wrong_with_the_certificate_of_the_core_is_told(
    begins: float,
    ends: float,
    hosts: list[str],
    told: str,
    remedy: str,
    authority: Authority,
    bundle: Path,
    tmp_path: Path,
) -> None:
    node = enrolled(authority, tmp_path / "core", "core")
    shown = Forger(authority).certificate(
        [f"trifold://{TENANT}/core/core"], hosts=hosts, begins=begins, ends=ends
    )
    write_private(node / "key.pem", shown.key)
    durable.write(node / "chain.pem", shown.chain)
    async with running_core(bundle, tls=node) as core:
        result = await doctor("--core", core.address, "--tls", enrolled(authority, tmp_path / "edge", "edge"))
    assert told in result.fault("core").detail
    assert remedy in result.fault("core").remedy


async def test_a_core_of_another_authority_is_told(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    Authority.init(tmp_path / "other", [HOST])
    core_node = enrolled(Authority(tmp_path / "other"), tmp_path / "core", "core")
    async with running_core(bundle, tls=core_node) as core:
        result = await doctor("--core", core.address, "--tls", enrolled(authority, tmp_path / "edge", "edge"))
    assert "of another authority" in result.fault("core").detail


async def test_a_far_core_and_a_narrow_link_are_measured(bundle: Path) -> None:
    """No measure can be better than what the proxy lets pass: 160 ms there and back, 400 kB/s each way."""
    async with running_core(bundle) as core, Proxy(core.address, delay=0.08, bandwidth=400_000) as link:
        result = await doctor("--core", link.address, "--bundle", bundle)
    [trip] = [finding for finding in result.of("core") if "round trip" in finding.detail]
    assert trip.verdict == "warning"
    assert float(trip.detail.split()[2]) >= 160
    [measured] = result.of("link")
    assert float(measured.detail.split()[4]) >= 160
    assert float(measured.detail.split("; ")[1].split()[0]) <= 0.4


@pytest.mark.parametrize(
    ("seconds", "verdict", "told"),
    [(0.5, "ok", "takes 0.5 s on the way"), (20.0, "warning", "20.0 s"), (0.0101, "ok", "too fast")],
)
def test_a_prompt_on_the_way_for_seconds_is_a_warning(seconds: float, verdict: str, told: str) -> None:
    finding = _told(Crossing(1, 200, 0.01), Crossing(512, 100_200, seconds))
    assert finding.verdict == verdict
    assert told in finding.detail


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
