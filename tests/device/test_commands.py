from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.processes import Processes
from trifold.device import Client, Message, Sampling, errors

Role = Literal["system", "user", "assistant"]

GREEDY = Sampling()

TRIFOLD = [sys.executable, "-m", "trifold.shared.cli.main"]


@pytest.fixture(scope="module")
def tiers(bundle: Path) -> Iterator[Processes]:
    with Processes(bundle) as running:
        yield running


@pytest.fixture(scope="module")
def device(tiers: Processes) -> list[str]:
    """The options that lead to the tiers."""
    return ["--edge", tiers.edge, "--bundle", str(tiers.bundle)]


def trifold(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TRIFOLD, *arguments], input=said, capture_output=True, text=True, check=False)


def sessions(tiers: Processes) -> int:
    with Client(tiers.edge, bundle=tiers.bundle) as client:
        return client.describe().sessions


def completion(tiers: Processes, prompt: str, sampling: Sampling = GREEDY) -> str:
    with Client(tiers.edge, bundle=tiers.bundle) as client:
        generation = client.generate(
            prompt,
            max_tokens=40,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        return "".join(chunk.text for chunk in generation)


def test_a_completion_goes_to_stdout_and_nothing_else_does(tiers: Processes, device: list[str]) -> None:
    ended = trifold("generate", *device, "--prompt", "Once", "--max-tokens", "40")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == completion(tiers, "Once")
    assert ended.stdout


def test_a_prompt_comes_from_stdin_to_the_last_byte(tiers: Processes, device: list[str]) -> None:
    for arguments in ([], ["--prompt", "-"]):
        ended = trifold("generate", *device, *arguments, "--max-tokens", "40", said="Once\n")
        assert ended.stdout == completion(tiers, "Once\n")


def test_sampling_is_as_asked_for(tiers: Processes, device: list[str]) -> None:
    options = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "5"]
    ended = trifold("generate", *device, "--prompt", "Once", "--max-tokens", "40", *options)
    assert ended.stdout == completion(tiers, "Once", Sampling(0.9, 50, 0.95, 5))
    text = ended.stdout
    stopped = trifold(
        "generate", *device, "--prompt", "Once", "--max-tokens", "40", *options, "--stop", text[5:8]
    )
    assert stopped.stdout == text[: text.index(text[5:8])]


def test_json_is_one_object_a_chunk_and_holds_the_trace_when_asked_for(device: list[str]) -> None:
    asked = ["generate", *device, "--prompt", "Once", "--max-tokens", "5", "--json"]
    chunks = [json.loads(line) for line in trifold(*asked).stdout.splitlines()]
    assert [len(chunk["token_ids"]) for chunk in chunks] == [1] * 5
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert "trace" not in chunks[0]
    trace = json.loads(trifold(*asked, "--trace").stdout.splitlines()[-1])["trace"]
    assert [tier["tier"] for tier in trace["tiers"]] == ["device", "edge", "cloud"]
    assert [link["link"] for link in trace["links"]] == ["device-edge", "edge-cloud"]
    assert all(link["bytes_up"] and link["bytes_down"] for link in trace["links"])


def test_traces_follow_the_text_on_stderr_as_waterfalls(device: list[str]) -> None:
    ended = trifold("generate", *device, "--prompt", "Once", "--max-tokens", "5", "--trace")
    first, mean = ended.stderr.split("Every other token")
    assert "The first token, after 4 tokens: " in first
    assert mean.startswith(", mean of 4: ")
    assert "edge-cloud" in first
    assert "edge-cloud" in mean
    single = trifold("generate", *device, "--prompt", "Once", "--max-tokens", "1", "--trace")
    assert "The first token" in single.stderr
    assert "Every other token" not in single.stderr


def test_settings_come_from_variables_and_a_file_too(
    tiers: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIFOLD_DEVICE_EDGE", tiers.edge)
    settings = tmp_path / "settings.toml"
    settings.write_text(f'[device]\nbundle = "{tiers.bundle}"\nedge = "127.0.0.1:1"\n')
    ended = trifold("generate", "--config", str(settings), "--prompt", "Once", "--max-tokens", "40")
    assert ended.stdout == completion(tiers, "Once")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--edge", "127.0.0.1:1"], errors.Unavailable, "is `trifold edge serve` running there?"),
        (["--bundle", "/nowhere"], errors.DamagedFile, "/nowhere"),
        (["--temperature", "-1"], errors.InvalidRequest, "temperature is -1"),
        (["--max-tokens", "1000"], errors.PromptTooLong, "256 positions"),
        (["--edge", "nowhere"], errors.ConfigError, "HOST:PORT"),
        (["--resume", "/nowhere"], errors.InvalidRequest, "leave out --prompt"),
        (["--prompt", ""], errors.InvalidRequest, "give --prompt TEXT"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    device: list[str], arguments: list[str], error: type[errors.TrifoldError], words: str
) -> None:
    ended = trifold("generate", *device, "--prompt", "Once", *arguments)
    assert ended.returncode == error.exit_code
    assert ended.stdout == ""
    assert words in ended.stderr
    assert ended.stderr.startswith("trifold: ")
    assert ended.stderr.count("\n") == 1


def test_a_killed_generation_is_resumed_from_its_journal(
    tiers: Processes, device: list[str], tmp_path: Path
) -> None:
    asked = ["--prompt", "Once upon", "--max-tokens", "200", "--temperature", "1", "--seed", "3"]
    whole = trifold("generate", *device, *asked).stdout
    journal = str(tmp_path / "journal")
    command = [*TRIFOLD, "generate", *device, *asked, "--journal", journal]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as killed:
        assert killed.stdout
        shown = killed.stdout.read(20)
        killed.kill()
        shown += killed.stdout.read()
    assert whole.encode().startswith(shown)
    for _ in range(2):  # what has ended is shown again
        assert trifold("generate", *device, "--resume", journal).stdout == whole


@pytest.mark.parametrize(
    "flag",
    ["--max-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop", "--journal", "--prompt"],
)
def test_what_a_journal_has_settled_is_refused_by_flag(flag: str) -> None:
    ended = trifold("generate", "--resume", "/nowhere", flag, "1")
    assert ended.returncode == errors.InvalidRequest.exit_code
    assert f"leave out {flag}\n" in ended.stderr


def test_an_interrupt_at_the_prompt_ends_it_at_once(device: list[str]) -> None:
    near, far = pty.openpty()
    command = [*TRIFOLD, "generate", *device]
    with subprocess.Popen(command, stdin=far, stdout=far, stderr=far, start_new_session=True) as running:
        os.close(far)
        try:
            read_until(near, b"ends it.")
            time.sleep(0.2)
            running.send_signal(signal.SIGINT)
            assert running.wait(20) == errors.Cancelled.exit_code
        finally:
            running.kill()
    os.close(near)


def test_a_loss_is_told_in_one_line(tiers: Processes, device: list[str]) -> None:
    command = [*TRIFOLD, "generate", *device, "--prompt", "Once", "--max-tokens", "250"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout
        assert running.stderr
        assert running.stdout.read(5)
        tiers.kill("edge")
        tiers.start("edge")
        running.stdout.read()
        told = running.stderr.read().decode()
    assert running.returncode == 0
    assert told.startswith(f"trifold: lost the edge at {tiers.edge}: trying for 30 s")
    assert told.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cancels_the_generation_and_frees_it(
    tiers: Processes, device: list[str], number: signal.Signals
) -> None:
    command = [*TRIFOLD, "generate", *device, "--prompt", "Once", "--max-tokens", "250"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout
        assert running.stderr
        assert running.stdout.read(5)
        running.send_signal(number)
        running.stdout.read()
        assert running.stderr.read() == b"trifold: the generation was cancelled\n"
    assert running.returncode == errors.Cancelled.exit_code
    wait_until_no_session_is_left(tiers)


def test_a_reader_that_leaves_ends_the_generation(tiers: Processes, device: list[str]) -> None:
    command = " ".join([*TRIFOLD, "generate", *device, "--prompt", "Once", "--max-tokens", "250"])
    ended = subprocess.run(f"{command} | head -c 3", shell=True, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    wait_until_no_session_is_left(tiers)


def test_a_chat_keeps_its_history(tiers: Processes, device: list[str]) -> None:
    ended = trifold(
        "chat",
        *device,
        "--system",
        "Be brief.",
        "--max-tokens",
        "8",
        said="One\n\n/what\nTwo\n/reset\nOne\n/quit\nx\n",
    )
    assert ended.returncode == 0
    assert "There is no /what" in ended.stderr
    with Client(tiers.edge, bundle=tiers.bundle) as client:

        def answer(*contents: str) -> str:
            roles: list[Role] = ["system", "user", "assistant", "user"]
            messages = [Message(role=role, content=said) for role, said in zip(roles, contents, strict=False)]
            prompt = client.chat_prompt(messages)
            return "".join(chunk.text for chunk in client.generate(prompt, max_tokens=8))

        first = answer("Be brief.", "One")
        second = answer("Be brief.", "One", first, "Two")
    assert ended.stdout == f"{first}\n{second}\n{first}\n"


def test_an_error_in_a_chat_costs_that_answer_only(device: list[str]) -> None:
    ended = trifold("chat", *device, "--max-tokens", "8", said="x" * 300 + "\nOne\n")
    assert ended.returncode == 0
    assert "256 positions" in ended.stderr
    assert ended.stdout.strip()


def test_ctrl_c_ends_an_answer_and_not_the_chat(tiers: Processes, device: list[str]) -> None:
    near, far = pty.openpty()
    command = [*TRIFOLD, "chat", *device, "--max-tokens", "200"]
    with subprocess.Popen(command, stdin=far, stdout=far, stderr=far, start_new_session=True) as running:
        os.close(far)
        try:
            read_until(near, b"> ")
            os.write(near, b"One\n")
            read_until(near, b"\n")
            os.read(near, 1)
            running.send_signal(signal.SIGINT)
            read_until(near, b"> ")
            wait_until_no_session_is_left(tiers)
            os.write(near, b"/quit\n")
            assert running.wait(20) == 0
        finally:
            running.kill()
    os.close(near)


def wait_until_no_session_is_left(tiers: Processes) -> None:
    """The edge hears of an answer's end a moment after the device has gone on."""
    until = time.monotonic() + 20
    while sessions(tiers):
        assert time.monotonic() < until, "the session of the answer that was ended is still open"
        time.sleep(0.1)


def read_until(terminal: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        seen += os.read(terminal, 1)
    return seen
