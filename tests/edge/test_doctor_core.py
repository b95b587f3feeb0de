"""What `trifold doctor` tells of the core and of the link to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.edge.examinations import doctor, fault, made_authority
from tests.identities import HOST, TENANT, Forger, answering, enrolled
from tests.network.proxy import Proxy
from tests.tiers import running_core
from trifold.cloud.authority.authority import Authority
from trifold.edge.doctor.core import CORE
from trifold.edge.doctor.link import Crossing, _told
from trifold.edge.doctor.patient import Patient


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return made_authority(tmp_path / "authority")


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


async def test_a_node_of_another_role_has_no_session_with_the_core(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    device = enrolled(authority, tmp_path / "device", "device")
    async with running_core(bundle, tls=enrolled(authority, tmp_path / "core", "core")) as core:
        result = await doctor("--tls", device, "--core", core.address, "--bundle", bundle)
    assert result.code == 1
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
    tmp_path: Path,
) -> None:
    shown = Forger(authority).certificate(
        [f"trifold://{TENANT}/core/core"], hosts=hosts, begins=begins, ends=ends
    )
    async with answering(shown) as core:
        result = await doctor("--core", core, "--tls", enrolled(authority, tmp_path / "edge", "edge"))
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
    assert float(measured.detail.split("; ")[1].split()[0]) < 1


@pytest.mark.parametrize(
    ("seconds", "verdict", "told"),
    [(0.5, "ok", "takes 0.5 s on the way"), (20.0, "warning", "20.0 s"), (0.0101, "ok", "too fast")],
)
def test_a_prompt_on_the_way_for_seconds_is_a_warning(seconds: float, verdict: str, told: str) -> None:
    finding = _told(Crossing(1, 200, 0.01), Crossing(512, 100_200, seconds))
    assert finding.verdict == verdict
    assert told in finding.detail
