from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trifold.device.service.content import Filtered, WordList
from trifold.shared.errors import ConfigError

WORDS = WordList(["bad", "a very bad word", "straße"])


def screened(words: WordList, pieces: list[str]) -> tuple[str, bool]:
    screen = words.screen()
    shown = ""
    for piece in pieces:
        shown += screen.push(piece)
        if screen.found:
            return shown, True
    return shown + screen.rest(), screen.found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("not BAD at all", "not "),
        ("bad", ""),
        ("badly abad bad_", None),
        ("so a very bad", "so a very "),
        ("so a very bad word!", "so "),
        ("in der STRASSE 5", "in der "),
        ("İ bad", "İ "),
        ("a very ba", None),
    ],
)
def test_a_text_ends_before_a_listed_word_wherever_it_is_cut(text: str, shown: str | None) -> None:
    expected = (text, False) if shown is None else (shown, True)
    assert screened(WORDS, list(text)) == expected
    for cut in range(len(text) + 1):
        assert screened(WORDS, [text[:cut], text[cut:]]) == expected


@given(st.lists(st.sampled_from(["a", "b", "ab", " ", "a b", "ba", "c", ""]), max_size=30))
def test_what_is_shown_does_not_depend_on_the_pieces_nor_has_a_word_of_the_list(pieces: list[str]) -> None:
    words = WordList(["ab", "a b", "b c"])
    text = "".join(pieces)
    shown, found = screened(words, pieces)
    assert (shown, found) == screened(words, [text])
    assert text.startswith(shown)
    assert found or shown == text
    words.check(f"{shown}.")


def test_only_what_may_be_the_beginning_of_a_word_is_held_back() -> None:
    screen = WORDS.screen()
    shown = [screen.push(piece) for piece in ("hel", " b", "e", " ba", "d")]
    assert shown == ["hel", " ", "be", " ", ""]


def test_a_prompt_with_a_listed_word_is_refused() -> None:
    WORDS.check("badly")
    with pytest.raises(Filtered):
        WORDS.check("Bad!")


@pytest.mark.parametrize("content", ["words = []", "words = 3", "wrods = ['a']", "words = [' ']", "=", None])
def test_a_file_that_is_no_list_of_words_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "words.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="content filter"):
        WordList.read(path)
