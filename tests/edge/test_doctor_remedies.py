"""What `trifold doctor` tells a newcomer: one cause is one fault, with the remedy that mends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.edge.examinations import Result, doctor, fault, forged, found, made_authority, running_authority
from tests.identities import HOST, enrolled
from tests.tiers import running_core, running_edge
from trifold.cloud.authority.authority import Authority
from trifold.edge.doctor.authority import AUTHORITY
from trifold.edge.doctor.bundle import BUNDLE
from trifold.edge.doctor.link import LINK
from trifold.edge.doctor.patient import Patient
from trifold.shared.bundle.folder import REMEDY
from trifold.shared.identity.name import Role

Damage = Callable[[Path], object]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return made_authority(tmp_path / "authority")


def faults(result: Result) -> list[str]:
    """The checks that found one, each as often as it did."""
    return [name for name, finding in result.findings if finding.verdict == "fault"]


def unheld(result: Result, check: str) -> bool:
    return [finding.detail for finding in result.of(check)] == ["the node's certificate does not hold"]


def _mismatched(node: Path) -> None:
    other = enrolled(made_authority(node.parent / "elsewhere"), node.parent / "other", "edge")
    shutil.copy(other / "key.pem", node / "key.pem")


def _of_another_authority(node: Path) -> None:
    (node / "authority.pem").write_bytes(made_authority(node.parent / "elsewhere").root_pem)


def _emptied(node: Path) -> None:
    shutil.rmtree(node)
    node.mkdir()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, "key.pem cannot be read"),
        (_emptied, "key.pem cannot be read"),
        (lambda node: (node / "chain.pem").unlink(), "chain.pem cannot be read"),
        (_mismatched, "is not the certificate of the key beside it"),
        (_of_another_authority, "is of another authority than the one beside it"),
    ],
)
async def test_a_node_whose_papers_do_not_hold_is_one_fault(
    damage: Damage, told: str, bundle: Path, tmp_path: Path
) -> None:
    async with running_authority(tmp_path / "authority") as server:
        node = enrolled(server.authority, tmp_path / "edge", "edge", address=server.renewal)
        damage(node)
        async with running_core(bundle, tls=enrolled(server.authority, tmp_path / "core", "core")) as core:
            result = await doctor("--bundle", bundle, "--core", core.address, "--tls", node)
    assert faults(result) == ["certificate"]
    assert told in result.fault("certificate").detail
    assert "trifold node enroll" in result.fault("certificate").remedy
    assert all(unheld(result, check) for check in ("authority", "core", "link"))


async def test_a_node_that_its_authority_has_revoked_is_one_fault(bundle: Path, tmp_path: Path) -> None:
    async with running_authority(tmp_path / "authority") as server:
        node = enrolled(server.authority, tmp_path / "edge", "edge", address=server.renewal)
        server.authority.register.revoke("edge")
        async with running_core(bundle, tls=enrolled(server.authority, tmp_path / "core", "core")) as core:
            result = await doctor("--bundle", bundle, "--core", core.address, "--tls", node)
    assert faults(result) == ["authority"]
    assert "a revoked node needs a new token" in result.fault("authority").remedy
    assert all(unheld(result, check) for check in ("core", "link"))


async def test_a_node_that_only_the_core_knows_to_be_revoked_is_one_fault(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    node = enrolled(authority, tmp_path / "edge", "edge")
    core_node = enrolled(authority, tmp_path / "core", "core")
    authority.register.revoke("edge")
    (core_node / "revoked.crl").write_bytes(authority.revocation_list())
    async with running_core(bundle, tls=core_node) as core:
        result = await doctor("--bundle", bundle, "--core", core.address, "--tls", node)
    assert faults(result) == ["core"]
    assert "trifold node enroll" in result.fault("core").remedy
    assert result.verdicts("link") == {"skipped"}


async def test_a_certificate_that_ran_out_is_one_fault(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    edge = forged(authority, tmp_path / "edge", begins=-25, ends=-1)
    async with running_core(bundle, tls=enrolled(authority, tmp_path / "core", "core")) as core:
        result = await doctor("--bundle", bundle, "--core", core.address, "--tls", edge)
    assert faults(result) == ["certificate"]
    assert all(unheld(result, check) for check in ("authority", "core", "link"))


async def test_an_authority_in_trouble_says_nothing_against_the_certificate(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    """Here its address is that of a core."""
    async with running_core(bundle, tls=enrolled(authority, tmp_path / "core", "core")) as core:
        node = enrolled(authority, tmp_path / "edge", "edge", address=core.address)
        result = await doctor("--core", core.address, "--tls", node)
    assert result.verdicts("authority") == {"warning"}
    assert result.verdicts("core") == {"ok"}


def test_papers_that_do_not_say_where_the_authority_is_are_a_warning(
    authority: Authority, tmp_path: Path
) -> None:
    node = enrolled(authority, tmp_path / "edge", "edge")
    (node / "authority.json").write_text("{}")
    assert [finding.verdict for finding in found(AUTHORITY, Patient(tls=node))] == ["warning"]


@pytest.mark.parametrize("part", [".", "device"])
def test_a_bundle_without_the_edges_part_is_a_fault_in_front_of_a_core(
    part: str, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle / "device", tmp_path / "device")
    patient = Patient(bundle=tmp_path / part, core=f"{HOST}:1")
    assert "the part of the device, and not the edge's" in fault(BUNDLE, patient).detail
    assert "folder `edge`" in fault(BUNDLE, patient).remedy
    assert {finding.verdict for finding in found(BUNDLE, Patient(bundle=tmp_path / part))} == {"ok"}


@pytest.mark.parametrize("role", ["device", "gateway"])
@pytest.mark.parametrize("split", [True, False])
def test_a_node_of_another_role_in_front_of_a_core_is_a_fault(
    role: Role, split: bool, authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    node = enrolled(authority, tmp_path / role, role)
    wrong = fault(LINK, Patient(core=f"{HOST}:1", tls=node, bundle=bundle if split else None))
    assert f"this node is a {role}" in wrong.detail
    assert "--role edge" in wrong.remedy


async def test_the_ports_of_the_authority_are_not_those_of_a_core(tmp_path: Path) -> None:
    async with running_authority(tmp_path / "authority") as server:
        node = enrolled(server.authority, tmp_path / "edge", "edge")
        enrolment = await doctor("--core", server.enrolment, "--tls", node)
        renewal = await doctor("--core", server.renewal, "--tls", node)
    assert "where nodes enrol" in enrolment.fault("core").detail
    assert "the right HOST:PORT" in enrolment.fault("core").remedy
    assert "the authority or something else answers there, not a core" in renewal.fault("core").detail


async def test_a_certificate_of_another_authority_may_be_that_of_a_wrong_port(
    authority: Authority, bundle: Path, tmp_path: Path
) -> None:
    other = enrolled(made_authority(tmp_path / "other"), tmp_path / "core", "core")
    async with running_core(bundle, tls=other) as core:
        result = await doctor("--core", core.address, "--tls", enrolled(authority, tmp_path / "edge", "edge"))
    assert "the port of another service" in result.fault("core").remedy


async def test_an_edge_that_was_taken_for_the_core_is_told(bundle: Path) -> None:
    async with running_core(bundle) as core, running_edge(bundle, core.address) as edge:
        result = await doctor("--core", edge.address, "--bundle", bundle)
    told = f"the core at {edge.address}: an edge, the authority or something else answers there, not a core"
    assert result.fault("core").detail == told
    assert [finding.detail for finding in result.of("link")] == [f"no session with the core: {told}"]


@pytest.mark.parametrize("name", ["manifest.json", "weights.bin"])
def test_the_remedy_of_a_damaged_bundle_is_told_once(name: str, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle / "edge", tmp_path / "edge"))
    with (copy / name).open("r+b") as file:
        file.write(b"\xff")
    wrong = fault(BUNDLE, Patient(bundle=copy))
    assert (wrong.remedy, REMEDY in wrong.detail) == (REMEDY, False)
