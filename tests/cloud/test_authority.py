from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from tests.identities import HOST, enrolled, pair, private
from trifold.cloud.authority.authority import Authority
from trifold.cloud.authority.command import certs
from trifold.cloud.authority.service import AuthorityServer
from trifold.shared.errors import ConfigError, Forbidden, InvalidRequest, TrifoldError
from trifold.shared.identity.command import node as node_command
from trifold.shared.identity.name import Identity
from trifold.shared.identity.node import Node
from trifold.shared.identity.request import new_key, requested_key, signing_request


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "authority", [HOST])


def told(app: object, *arguments: str) -> str:
    """What a command prints; raises what it fails with."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.output


def test_an_authority_is_made_once_and_its_keys_are_its_own(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="lock its nodes out"):
        Authority.init(authority.folder, [HOST])
    for key in authority.folder.rglob("*key*"):
        assert key.stat().st_mode & 0o777 == 0o600


def test_a_folder_without_an_authority_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trifold certs init"):
        Authority(tmp_path)


def test_no_certificate_holds_for_more_than_24_hours(authority: Authority, tmp_path: Path) -> None:
    longer = Authority(authority.folder, timedelta(days=30))
    for role in ("device", "edge"):
        certificate = Node(enrolled(longer, tmp_path / role, role)).papers.certificate
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert life <= timedelta(hours=24)


def test_who_others_call_says_at_which_hosts(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="--host"):
        authority.invite(Identity(("site",), "edge", "edge"), (), timedelta(hours=1))


def test_a_name_belongs_to_one_node(authority: Authority, tmp_path: Path) -> None:
    enrolled(authority, tmp_path / "one", "device", "tablet")
    enrolled(authority, tmp_path / "again", "device", "tablet")
    for identity in (Identity(("other",), "device", "tablet"), Identity(("site",), "trainer", "tablet")):
        with pytest.raises(ConfigError, match="another role or tenant"):
            authority.invite(identity, (), timedelta(hours=1))


def test_a_request_for_a_key_on_a_curve_that_nobody_knows_is_none(authority: Authority) -> None:
    known, unknown = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d03017f")
    request = signing_request(new_key()).replace(known, unknown)
    with pytest.raises(InvalidRequest, match="signing request is none"):
        authority.enrol("a token", request)


@pytest.mark.parametrize("byte", [0x00, 0x20, 0x7F, 0x80, 0xFF])
def test_whatever_byte_of_a_signing_request_is_changed_it_is_refused(authority: Authority, byte: int) -> None:
    request = signing_request(new_key())
    for at in range(len(request)):
        changed = request[:at] + bytes([byte]) + request[at + 1 :]
        if changed != request:
            with pytest.raises(InvalidRequest, match="signing request"):
                requested_key(changed)


def test_a_certificate_is_renewed_for_its_own_key_only(authority: Authority, tmp_path: Path) -> None:
    shown = pair(enrolled(authority, tmp_path / "node", "device"))
    certificate = x509.load_pem_x509_certificate(shown.chain)
    with pytest.raises(InvalidRequest, match="another key"):
        authority.renew(certificate, signing_request(new_key()))
    request = signing_request(private(shown.key))
    renewed = x509.load_pem_x509_certificate(authority.renew(certificate, request))
    assert renewed.serial_number != certificate.serial_number
    assert Identity.of(renewed) == Identity.of(certificate)


@pytest.mark.parametrize("request_", [b"", b"nonsense", b"\x30\x82"])
def test_a_signing_request_that_is_none_costs_no_token(authority: Authority, request_: bytes) -> None:
    token = authority.invite(Identity(("site",), "device", "tablet"), (), timedelta(hours=1))
    with pytest.raises(InvalidRequest):
        authority.enrol(token, request_)
    assert authority.enrol(token, signing_request(new_key()))


def test_a_revoked_node_enrols_again_with_another_token(authority: Authority, tmp_path: Path) -> None:
    before = authority.invite(Identity(("site",), "device", "device"), (), timedelta(hours=1))
    old = Node(enrolled(authority, tmp_path / "old", "device")).papers.certificate
    assert authority.register.revoke("device") == 1
    with pytest.raises(Forbidden):
        authority.enrol(before, signing_request(new_key()))
    new = Node(enrolled(authority, tmp_path / "new", "device")).papers.certificate
    _, serials = authority.register.revoked()
    assert old.serial_number in serials
    assert new.serial_number not in serials


def test_a_node_is_revoked_by_what_the_list_shows_and_by_its_whole_name(
    authority: Authority, tmp_path: Path
) -> None:
    folder = str(authority.folder)
    enrolled(authority, tmp_path / "edge", "edge", "edge-1")
    enrolled(authority, tmp_path / "core", "core", "core-1", tenants=["one", "two"])
    shown = [line.split()[0] for line in told(certs, "list", folder).splitlines()]
    assert shown[1:] == ["trifold://one,two/core/core-1", "trifold://site/edge/edge-1"]
    for wrong in ("trifold://other/edge/edge-1", "trifold://site/core/edge-1", "x/edge-1", "edge-1/"):
        with pytest.raises(ConfigError, match="there is no node"):
            told(certs, "revoke", folder, wrong)
    assert "revoked edge-1: 1 certificate\n" in told(certs, "revoke", folder, shown[2])
    assert "revoked core-1: 1 certificate\n" in told(certs, "revoke", folder, shown[1])
    assert "revoked core-1: 0 certificates\n" in told(certs, "revoke", folder, "trifold://two/core/core-1")


def test_who_revokes_a_service_is_told_that_others_go_on_calling_it(
    authority: Authority, tmp_path: Path
) -> None:
    for role in ("core", "edge", "gateway"):
        enrolled(authority, tmp_path / role, role)
        said = told(certs, "revoke", str(authority.folder), role)
        assert f"others go on calling this {role} until its certificate has run out" in said
    assert "until its certificate has run out" in " ".join(told(certs, "revoke", "--help").split())


def test_commands_make_an_authority_enrol_a_node_and_revoke_it(tmp_path: Path) -> None:
    folder, node = str(tmp_path / "authority"), str(tmp_path / "node")
    fingerprint = told(certs, "init", folder, "--host", HOST).split()[-1]
    token = told(certs, "token", folder, "--node", "tablet", "--role", "device", "--tenant", "site").strip()
    assert "has not enrolled" in told(certs, "list", folder)
    script = "from trifold.cloud.authority.command import certs; certs()"
    serve = ["serve", folder, "--listen", f"{HOST}:0", "--listen-nodes", f"{HOST}:0"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *serve], stdout=subprocess.PIPE, text=True
    ) as process:
        overdue = threading.Timer(60, process.kill)
        overdue.start()
        try:
            assert process.stdout
            words = process.stdout.readline().split()
            address = words[4].rstrip(",")
            enrolling = ["enroll", address, "--token", token, "--fingerprint", fingerprint, "--into", node]
            assert "trifold://site/device/tablet, certificate good until" in told(node_command, *enrolling)
            assert "good until" in told(certs, "list", folder)
            first = pair(Path(node))
            told(node_command, "renew", node)
            assert pair(Path(node)).chain != first.chain
            assert told(certs, "revoke", folder, "tablet") == "revoked tablet: 2 certificates\n"
            assert "revoked at" in told(certs, "list", folder)
            with pytest.raises(TrifoldError, match=r"revoked|enrol the node anew"):
                told(node_command, "renew", node)
        finally:
            process.terminate()
            overdue.cancel()
        assert process.wait() == 0


async def test_a_node_that_could_not_be_renewed_is_told_when_it_enrols(
    tmp_path: Path,
) -> None:
    authority = Authority.init(tmp_path / "authority", ["another.example"])
    server = AuthorityServer(authority, f"{HOST}:0", f"{HOST}:0")
    await server.start()
    token = authority.invite(Identity(("site",), "device", "tablet"), (), timedelta(hours=1))
    enrolling = ["enroll", server.enrolment, "--token", token, "--fingerprint", authority.fingerprint]
    said = await asyncio.to_thread(told, node_command, *enrolling, "--into", str(tmp_path / "node"))
    await server.stop()
    assert "certificate good until" in said
    assert "could not be renewed as it is now" in said


def test_a_role_that_is_none_is_told(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="it must be client, device"):
        told(certs, "token", str(authority.folder), "--node", "a", "--role", "root", "--tenant", "site")
