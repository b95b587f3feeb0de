from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.identities import HOST, TENANT, Forger, enrolled, pair
from trifold.cloud.authority.authority import Authority
from trifold.cloud.authority.service import AuthorityServer
from trifold.shared import durable
from trifold.shared.errors import (
    ConfigError,
    DamagedFile,
    Forbidden,
    Unauthenticated,
    Unavailable,
)
from trifold.shared.identity.access import ACCESS, SERVED_BY, check, check_serving
from trifold.shared.identity.command import node as node_command
from trifold.shared.identity.enrolment import enrol
from trifold.shared.identity.keeper import Keeper
from trifold.shared.identity.name import Identity
from trifold.shared.identity.node import Node
from trifold.shared.identity.request import write_private
from trifold.shared.identity.revocations import Revocations
from trifold.shared.session.channel import Connection, way
from trifold.shared.session.door import Door

DEVICE = Identity(("site",), "device", "tablet")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "authority", [HOST])


@pytest.fixture
async def running(authority: Authority) -> AsyncIterator[AuthorityServer]:
    server = AuthorityServer(authority, f"{HOST}:0", f"{HOST}:0")
    await server.start()
    yield server
    await server.stop()


def invited(authority: Authority, hours: float = 1.0) -> str:
    return authority.invite(DEVICE, (), timedelta(hours=hours))


async def test_a_machine_becomes_a_node_with_a_key_that_only_it_can_read(
    running: AuthorityServer, tmp_path: Path
) -> None:
    authority, folder = running.authority, tmp_path / "node"
    node = await enrol(running.enrolment, invited(authority), authority.fingerprint, folder)
    assert node.identity == DEVICE
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert node.authority_address == running.renewal
    life = node.papers.certificate.not_valid_after_utc - node.papers.certificate.not_valid_before_utc
    assert life <= timedelta(hours=24)
    with pytest.raises(ConfigError, match="holds a node already"):
        await enrol(running.enrolment, invited(authority), authority.fingerprint, folder)


@pytest.mark.parametrize("colons", [False, True])
async def test_a_fingerprint_may_be_written_as_openssl_does(
    running: AuthorityServer, tmp_path: Path, colons: bool
) -> None:
    pinned = running.authority.fingerprint.upper()
    if colons:
        pinned = ":".join(pinned[i : i + 2] for i in range(0, len(pinned), 2))
    await enrol(running.enrolment, invited(running.authority), pinned, tmp_path / "node")


async def test_whoever_has_another_fingerprint_never_sees_the_token(
    running: AuthorityServer, tmp_path: Path
) -> None:
    token, folder = invited(running.authority), tmp_path / "node"
    with pytest.raises(Unauthenticated, match="somebody else may be answering"):
        await enrol(running.enrolment, token, "00" * 32, folder)
    assert not folder.exists()
    await enrol(running.enrolment, token, running.authority.fingerprint, folder)


@pytest.mark.parametrize("pinned", ["", "00" * 31, "00" * 33, "fingerprint " + "00" * 32, "0g" * 32])
async def test_a_fingerprint_that_is_none_is_told_as_that(
    running: AuthorityServer, tmp_path: Path, pinned: str
) -> None:
    with pytest.raises(ConfigError, match="must be 64 hex digits"):
        await enrol(running.enrolment, invited(running.authority), pinned, tmp_path / "node")


async def test_who_enrols_at_the_port_for_enrolled_nodes_is_told_of_the_other_one(
    running: AuthorityServer, tmp_path: Path
) -> None:
    token, fingerprint = invited(running.authority), running.authority.fingerprint
    with pytest.raises(Unauthenticated, match=r"port for enrolled nodes: give that of .* --listen"):
        await enrol(running.renewal, token, fingerprint, tmp_path / "node")
    with pytest.raises(Unauthenticated, match=r"somebody else may be answering there$"):
        await enrol(running.enrolment, token, "00" * 32, tmp_path / "node")


async def test_a_token_holds_once(running: AuthorityServer, tmp_path: Path) -> None:
    token, fingerprint = invited(running.authority), running.authority.fingerprint
    attempts = (enrol(running.enrolment, token, fingerprint, tmp_path / f"node-{i}") for i in range(4))
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Forbidden"] * 3 + ["Node"]


async def test_a_token_that_is_unknown_or_too_old_is_refused(
    running: AuthorityServer, tmp_path: Path
) -> None:
    for token in ("", "unknown", invited(running.authority, hours=-1)):
        with pytest.raises(Forbidden, match="ask for another one"):
            await enrol(running.enrolment, token, running.authority.fingerprint, tmp_path / "node")


async def test_where_nobody_enrols_it_is_told(tmp_path: Path, unused_tcp_port: int) -> None:
    with pytest.raises(Unavailable, match="trifold certs serve"):
        await enrol(f"{HOST}:{unused_tcp_port}", "token", "00" * 32, tmp_path / "node")


async def test_a_certificate_is_renewed_for_the_same_key_and_new_calls_show_it(
    running: AuthorityServer, tmp_path: Path
) -> None:
    folder = enrolled(running.authority, tmp_path / "node", "device", address=running.renewal)
    node, other = Node(folder), Node(folder)
    connection = Connection(running.renewal, other)
    before, channel, shown = pair(folder), connection.channel, other.papers.certificate
    assert connection.channel is channel
    await Keeper(node).look()
    assert pair(folder) == before, "not due yet"
    await Keeper(node).renew()
    assert pair(folder).key == before.key
    assert other.papers.certificate.serial_number != shown.serial_number
    assert connection.channel is not channel
    await connection.close()


async def test_a_certificate_is_due_at_half_of_its_life(running: AuthorityServer, tmp_path: Path) -> None:
    young = enrolled(running.authority, tmp_path / "young", "device", "young")
    assert not Node(young).due
    half = Authority(running.authority.folder, timedelta(seconds=0))
    old = enrolled(half, tmp_path / "old", "device", "old", address=running.renewal)
    assert Node(old).due


async def test_a_revoked_node_is_not_renewed(running: AuthorityServer, tmp_path: Path) -> None:
    folder = enrolled(running.authority, tmp_path / "node", "device", address=running.renewal)
    running.authority.register.revoke("device")
    with pytest.raises((Forbidden, Unauthenticated), match=r"enrol the node anew|was revoked"):
        await Keeper(Node(folder)).renew()


async def test_a_service_learns_who_was_revoked_and_keeps_it(
    running: AuthorityServer, tmp_path: Path
) -> None:
    folder = enrolled(running.authority, tmp_path / "core", "core", address=running.renewal)
    victim = Node(enrolled(running.authority, tmp_path / "edge", "edge")).papers.certificate
    node = Node(folder)
    running.authority.register.revoke("edge")
    await Keeper(node, revoked=True).look()
    assert victim in node.revoked
    assert victim in Node(folder).revoked
    assert node.papers.certificate not in node.revoked


def test_a_list_of_revocations_counts_when_it_is_newer_and_signed(
    authority: Authority, tmp_path: Path
) -> None:
    certificate = Node(enrolled(authority, tmp_path / "node", "device")).papers.certificate
    revocations, old = Revocations(tmp_path / "list", authority.root), authority.revocation_list()
    authority.register.revoke("device")
    revocations.take(authority.revocation_list())
    revocations.take(old)
    assert certificate in revocations
    other = Authority.init(tmp_path / "other", [HOST])
    for wrong in (other.revocation_list(), b"", b"\x30\x00", old[:-1]):
        with pytest.raises(DamagedFile, match="list of revoked certificates"):
            revocations.take(wrong)


def test_a_folder_that_is_not_a_nodes_is_told_by_the_file(authority: Authority, tmp_path: Path) -> None:
    folder = enrolled(authority, tmp_path / "node", "device")
    other = enrolled(authority, tmp_path / "other", "device", "other")
    key = (folder / "key.pem").read_bytes()
    wrong = {
        "key.pem": [b"nonsense", authority.root_pem],
        "chain.pem": [b"nonsense", (other / "chain.pem").read_bytes()],
        "authority.pem": [b"nonsense"],
    }
    for name, contents in wrong.items():
        right = (folder / name).read_bytes()
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(ConfigError, match=name):
                Node(folder)
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=f"{name} cannot be read"):
            Node(folder)
        (folder / name).write_bytes(right)
        (folder / name).chmod(0o600)
    (folder / "key.pem").write_bytes(key)
    (folder / "key.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Node(folder)


def test_a_certificate_that_is_replaced_by_rubbish_is_told_and_not_used(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = enrolled(authority, tmp_path / "node", "device")
    node = Node(folder)
    before = node.papers
    (folder / "chain.pem").write_bytes(b"rubbish")
    assert node.papers == before
    assert "goes on with the certificate it had" in caplog.text


async def test_a_folder_that_was_enrolled_anew_is_told_to_whoever_runs_as_it(
    running: AuthorityServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority, folder = running.authority, tmp_path / "node"
    node = await enrol(running.enrolment, invited(authority), authority.fingerprint, folder)
    before = node.papers
    shutil.rmtree(folder)
    await enrol(running.enrolment, invited(authority), authority.fingerprint, folder)
    assert node.papers == before
    assert "was enrolled anew: restart what runs as it" in caplog.text
    with pytest.raises(ConfigError, match="enrolled anew"):
        node.renew(before.chain)  # or what runs would put its own in place of the new one


def ran_out(authority: Authority, folder: Path, address: str = "") -> Node:
    """An edge that was off for a day."""
    enrolled(authority, folder, "edge", address=address)
    old = Forger(authority).certificate([f"trifold://{TENANT}/edge/edge"], begins=-25, ends=-1)
    write_private(folder / "key.pem", old.key)
    durable.write(folder / "chain.pem", old.chain)
    return Node(folder)


RAN_OUT = r"/edge/edge ran out at .* UTC: enrol the node anew, into a new folder"


async def test_with_a_certificate_that_ran_out_nothing_is_called(
    running: AuthorityServer, tmp_path: Path
) -> None:
    node = ran_out(running.authority, tmp_path / "edge", running.renewal)
    with pytest.raises(Unauthenticated, match=RAN_OUT):
        await Keeper(node).renew()
    with pytest.raises(Unauthenticated, match=RAN_OUT):
        _ = Connection(running.renewal, node).channel


async def test_with_a_certificate_that_ran_out_no_service_starts(
    authority: Authority, tmp_path: Path
) -> None:
    ran_out(authority, tmp_path / "edge")
    with pytest.raises(ConfigError, match=RAN_OUT):
        await Door(f"{HOST}:0", "trifold.proto.v1.EdgeService", tmp_path / "edge").open()


async def test_a_certificate_that_ran_out_is_not_told_as_good(
    running: AuthorityServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = ran_out(running.authority, tmp_path / "edge", running.renewal)
    looked = asyncio.Event()
    keeping = asyncio.create_task(Keeper(node, looked=looked.set).run())
    await looked.wait()
    keeping.cancel()
    shown = CliRunner().invoke(node_command, ["show", str(tmp_path / "edge")]).output
    for told in (caplog.text, shown):
        assert "ran out at" in told
        assert "good until" not in told


@pytest.mark.parametrize("address", ["0.0.0.0:1", "192.0.2.1:1", "edge.example:1", "[::]:1"])
def test_off_loopback_there_is_tls_or_insecure_by_hand(
    authority: Authority, tmp_path: Path, address: str
) -> None:
    with pytest.raises(ConfigError, match="--tls, or --insecure"):
        way(address, None)
    assert way(address, None, insecure=True) is None
    assert way(address, enrolled(authority, tmp_path / "node", "device")) is not None


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1"])
def test_on_loopback_there_need_be_no_tls(address: str) -> None:
    assert way(address, None) is None


def test_what_is_not_in_the_table_nobody_may_call() -> None:
    with pytest.raises(Forbidden, match="may not call"):
        check(DEVICE, "/trifold.proto.v1.EdgeService/Unheard", None)
    assert all(ACCESS.values())


def test_a_service_is_served_by_nodes_of_its_role_alone() -> None:
    assert {name.strip("/").partition("/")[0] for name in ACCESS if "trifold" in name} == set(SERVED_BY)
    for service, role in SERVED_BY.items():
        check_serving(Identity(("site",), role, "node"), service)
    gateway = Identity(("site",), "gateway", "tablet")
    with pytest.raises(ConfigError, match=r"role edge, and this is trifold://site/gateway/tablet"):
        check_serving(gateway, "trifold.proto.v1.EdgeService")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_is_not_offered_what_the_pages_make_in_a_clone_and_hides_nothing_of_its_own() -> None:
    made = ["node/key.pem", "node/chain.pem", "authority/node/key.pem", "authority/register.sqlite"]
    made += ["token", "fingerprint", "edge-1/token", "device-1/token", "n3/key.pem"]
    for path in made:
        ignored = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT)
        assert ignored.returncode == 0, path
    hidden = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert not subprocess.run(hidden, cwd=ROOT, capture_output=True, check=True).stdout


@pytest.mark.parametrize("name", ["", "a/b", "a b", "-a", "ä", "a" * 65])
def test_a_name_is_one_that_a_certificate_can_carry(name: str) -> None:
    for tenant, node in (("site", name), (name, "edge")):
        with pytest.raises(ConfigError, match="is no name"):
            Identity((tenant,), "edge", node)
