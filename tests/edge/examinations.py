"""`trifold doctor` as its own process and its checks by themselves, for tests, with what they look at."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from tests.identities import HOST, TENANT, Forger
from trifold.cloud.authority.authority import Authority
from trifold.cloud.authority.service import AuthorityServer
from trifold.edge.doctor.check import Check
from trifold.edge.doctor.finding import Finding
from trifold.edge.doctor.patient import Patient
from trifold.shared import durable
from trifold.shared.identity.request import write_private

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


def made_authority(folder: Path) -> Authority:
    """One that is not running."""
    Authority.init(folder, [HOST])
    return Authority(folder)


def forged(authority: Authority, folder: Path, *, begins: float, ends: float) -> Path:
    """An edge whose certificate holds from so many hours from now to so many."""
    made = Forger(authority).certificate([f"trifold://{TENANT}/edge/edge"], begins=begins, ends=ends)
    folder.mkdir()
    write_private(folder / "key.pem", made.key)
    durable.write(folder / "chain.pem", made.chain)
    durable.write(folder / "authority.pem", authority.root_pem)
    return folder
