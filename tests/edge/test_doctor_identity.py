"""What `trifold doctor` tells of certificates, authorities and clocks."""

from __future__ import annotations

from pathlib import Path
from time import time

import pytest

from tests.edge.examinations import doctor, fault, forged, found, made_authority, running_authority
from tests.identities import HOST, enrolled
from tests.tiers import running_core
from trifold.cloud.authority.authority import Authority
from trifold.edge.doctor.authority import AUTHORITY
from trifold.edge.doctor.certificate import CERTIFICATE
from trifold.edge.doctor.patient import Patient
from trifold.shared.session import service as service_module


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return made_authority(tmp_path / "authority")


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
    assert "does not hold" in result.of("core")[0].detail


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
