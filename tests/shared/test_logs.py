"""The logs of services: lines for people or JSON, with numbers and without secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import asyncio, logging, sys
from trifold.shared.cli.logs import log_service
from trifold.shared.telemetry.request import begin_request

log_service("info", sys.argv[1])
log = logging.getLogger("trifold.test")

async def request():
    begin_request()
    await asyncio.sleep(0)
    log.info("%d positions", 7)

async def main():
    await asyncio.gather(*(asyncio.create_task(request()) for _ in range(2)))

log.debug("small")
asyncio.run(main())
logging.getLogger("theirs").warning("other packages, too")
secret = "token 4711"
try:
    raise ValueError("wrong")
except ValueError:
    log.exception("internal error %s", "ab12")
"""


def logged(form: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, form], capture_output=True, text=True, check=True
    ).stderr


def test_a_line_of_json_has_its_time_level_logger_and_the_number_of_its_request() -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in logged("json").splitlines()]
    first, second, theirs, error = lines
    assert first.pop("timestamp").endswith("Z")
    assert first == {"event": "7 positions", "level": "info", "logger": "trifold.test", "request": 1}
    assert second["request"] == 2
    assert (theirs["event"], theirs["level"]) == ("other packages, too", "warning")
    assert "request" not in theirs
    assert error["event"] == "internal error ab12"
    assert "ValueError: wrong" in error["exception"]


def test_lines_for_people_have_the_same_and_no_colours_in_a_file() -> None:
    text = logged("console")
    assert "7 positions" in text
    assert "request=2" in text
    assert "small" not in text
    assert "ValueError: wrong" in text
    assert "\x1b[" not in text


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_does_not_tell_the_values_of_variables(form: str) -> None:
    assert "4711" not in logged(form)
