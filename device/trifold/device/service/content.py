"""The content filter: what a site does not want asked or answered."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trifold.shared.errors import ConfigError, InvalidRequest


class Filtered(InvalidRequest):
    """The prompt has something in it that the content filter of the site does not let through."""

    reason = "CONTENT_FILTER"


class Screen(Protocol):
    """What one answer passes through, in whatever pieces it comes."""

    @property
    def found(self) -> bool:
        """Whether the answer ends here, for what would follow is not let through."""
        ...

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        ...

    def rest(self) -> str:
        """What was held back, when no more text will come; `found` may turn out to be true."""
        ...


class ContentFilter(Protocol):
    """The hook: anything that can judge a prompt and screen an answer."""

    def check(self, prompt: str) -> None:
        """Raises Filtered."""
        ...

    def screen(self) -> Screen: ...


class WordFile(BaseModel):
    """The TOML file of a word list: `words = ["…", …]`."""

    model_config = ConfigDict(extra="forbid")

    words: list[str] = Field(min_length=1)


class WordList:
    """Lets no listed word through, however it is written large or small; a word may be several."""

    def __init__(self, words: Iterable[str]) -> None:
        """Raises ConfigError for a word that is empty."""
        self._words = tuple(" ".join(word.casefold().split()) for word in words)
        if "" in self._words:
            raise ConfigError("a word of the content filter is empty")
        longest_first = sorted(self._words, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ConfigError when the file cannot be used."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls(WordFile.model_validate(content).words)
        except OSError as error:
            raise ConfigError(f"the content filter {path} cannot be read: {error.strerror}") from None
        except ValidationError:
            raise ConfigError(f'the content filter {path} must be `words = ["…", …]`') from None
        except ValueError as error:
            raise ConfigError(f"the content filter {path} is not TOML: {error}") from None

    def check(self, prompt: str) -> None:
        """Raises Filtered."""
        if self._pattern.search(prompt.casefold()):
            raise Filtered("the content filter of this site does not let this prompt through")

    def screen(self) -> WordScreen:
        return WordScreen(self._words, self._pattern)


class WordScreen:
    """Holds back what may be the beginning of a word of the list until it turns out not to be."""

    def __init__(self, words: tuple[str, ...], pattern: re.Pattern[str]) -> None:
        self.found = False
        self._words = words
        self._pattern = pattern
        self._longest = max(map(len, words))
        self._text = ""  # one character that has been shown, for the word's edge, and what is held back
        self._shown = 0

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        self._text += text
        start = self._possible_start()
        match = self._match()
        # One that reaches the end may be the beginning of a longer word, …
        certain = match and match.end() < len(match.string)
        # … and one that begins later may be a part of it.
        if match and certain and match.start() <= len(self._text[:start].casefold()):
            return self._end_at(match.start())
        return self._show(start)

    def rest(self) -> str:
        """What was held back, when no more text will come."""
        match = self._match()
        return self._end_at(match.start()) if match else self._show(len(self._text))

    def _match(self) -> re.Match[str] | None:
        return self._pattern.search(self._text.casefold(), len(self._text[: self._shown].casefold()))

    def _end_at(self, folded: int) -> str:
        """Ends before what is at `folded` in the folded text, which may be longer than the text."""
        self.found = True
        ends = range(len(self._text) + 1)
        return self._show(next(end for end in ends if len(self._text[:end].casefold()) >= folded))

    def _show(self, end: int) -> str:
        text = self._text[self._shown : end]
        keep = max(0, end - 1)
        self._text, self._shown = self._text[keep:], end - keep
        return text

    def _possible_start(self) -> int:
        """Where the earliest word may begin that the text has not enough of yet."""
        for start in range(max(self._shown, len(self._text) - self._longest), len(self._text)):
            if start and re.match(r"\w", self._text[start - 1]):
                continue
            tail = self._text[start:].casefold()
            if any(word.startswith(tail) for word in self._words):
                return start
        return len(self._text)
