from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.checkpoints import write_tokenizer
from trifold.device.client.journal import Request
from trifold.device.client.text import Characters, StopStrings, Transcript
from trifold.shared.runtime.sampling import Sampling

EOS = 257


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, as GPT-2 writes bytes."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 260)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Words with a leading ▁, and bytes for all else, as Llama writes them."""
    words = {"▁Hello": 256, "▁world": 257, "!": 258, "▁": 259}
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab={**bytes_, **words}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def request(prompt: tuple[int, ...], stop: tuple[str, ...] = (), max_tokens: int = 1000) -> Request:
    return Request(
        serving_digest="0" * 64,
        prompt=prompt,
        sampling=Sampling(),
        max_tokens=max_tokens,
        stop=stop,
        eos=(EOS,),
    )


# A replacement character of the text's own at its very end is held back too: it looks like half a character.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")


@given(text=st.text(CHARACTERS, max_size=30))
def test_the_pieces_are_the_text_and_no_piece_holds_half_a_character(
    byte_level: Tokenizer, text: str
) -> None:
    characters = Characters(byte_level, byte_level.encode("prompt").ids)
    pieces = [characters.push(token) for token in byte_level.encode(text).ids]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


def test_a_character_of_four_bytes_comes_with_the_last_of_them(byte_level: Tokenizer) -> None:
    characters = Characters(byte_level, [65])
    assert [characters.push(token) for token in byte_level.encode("🦉").ids] == ["", "", "", "🦉"]


def test_bytes_that_are_no_character_are_shown_as_such_once_that_is_certain(byte_level: Tokenizer) -> None:
    characters = Characters(byte_level, [65])
    owl, letter = byte_level.encode("🦉").ids, byte_level.encode("x").ids
    assert "".join(characters.push(token) for token in [*owl[:2], *letter]) == "\ufffdx"


def test_spaces_before_words_survive_though_the_decoder_drops_the_first_of_a_text(
    byte_fallback: Tokenizer,
) -> None:
    characters = Characters(byte_fallback, [256])
    assert [characters.push(token) for token in (257, 258, 256)] == [" world", "!", " Hello"]


@given(text=st.text(CHARACTERS, min_size=1, max_size=12))
def test_long_runs_of_fallback_bytes_come_out_whole(byte_fallback: Tokenizer, text: str) -> None:
    characters = Characters(byte_fallback, [256])
    assert "".join(characters.push(byte) for byte in text.encode()) == text


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_a_stop_string_is_found_wherever_the_pieces_of_text_begin(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    watch = StopStrings(stops)
    shown = ""
    for piece in pieces:
        shown += watch.push(piece)
        if watch.found:
            break
    else:
        shown += watch.rest()
    assert (watch.found, shown) == until_first_stop(text, stops)


def until_first_stop(text: str, stops: list[str]) -> tuple[bool, str]:
    """The definition: the first character at which a stop string ends, and the longest one that does."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return True, text[: end - max(map(len, ending))]
    return False, text


def test_text_that_may_begin_a_stop_string_is_held_back_no_longer_than_needed() -> None:
    watch = StopStrings(["\n\nEND"])
    assert watch.push("one\n") == "one"
    assert watch.push("\nE") == ""
    assert watch.push("very") == "\n\nEvery"


def test_a_stop_string_across_tokens_ends_the_text_before_it(byte_level: Tokenizer) -> None:
    transcript = Transcript(byte_level, request((1, 2), stop=("END",)))
    shown = ""
    for token in byte_level.encode("begin END and more").ids:
        shown += transcript.push(token)
        if transcript.finish_reason:
            break
    assert (shown, transcript.finish_reason) == ("begin ", "stop")


def test_an_eos_token_ends_the_text_with_what_was_held_back_and_adds_nothing(byte_level: Tokenizer) -> None:
    transcript = Transcript(byte_level, request((1,), stop=("END",)))
    shown = "".join(transcript.push(token) for token in byte_level.encode("an E").ids)
    assert shown == "an "
    assert transcript.push(EOS) == "E"
    assert transcript.finish_reason == "stop"


def test_the_last_token_ends_the_text_without_half_a_character(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("a🦉").ids[:4]
    transcript = Transcript(byte_level, request((1,), max_tokens=4))
    assert "".join(transcript.push(token) for token in tokens) == "a"
    assert transcript.finish_reason == "length"
