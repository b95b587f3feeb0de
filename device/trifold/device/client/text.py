"""From tokens to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from tokenizers import Tokenizer

from trifold.device.client.journal import Request

FinishReason = Literal["stop", "length", "cancelled"]

_CONTEXT: Final = 6
"""Tokens of the prompt that are decoded with the first new one."""

_HALF: Final = "\N{REPLACEMENT CHARACTER}"


class Transcript:
    """The text of a generation as its tokens come, and why it ends.

    A token that ends the text (eos) adds nothing to it; characters that may begin a stop string are held back
    until they turn out not to.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._left = request.max_tokens
        self._characters = Characters(tokenizer, request.prompt)
        self._stop = StopStrings(request.stop)

    def push(self, token: int) -> str:
        """The text that this token makes certain; sets `finish_reason` when it is the last."""
        self._left -= 1
        if token in self._request.eos:
            return self.finish("stop")
        text = self._stop.push(self._characters.push(token))
        if self._stop.found:
            self.finish_reason = "stop"
        elif self._left == 0:
            return text + self.finish("length")
        return text

    def finish(self, reason: FinishReason) -> str:
        """Ends here; returns what was held back, less half a character."""
        text = self._stop.push(self._characters.rest())
        self.finish_reason = "stop" if self._stop.found else reason
        return text + self._stop.rest()


class Characters:
    """Decodes token by token. A character whose bytes come in several tokens appears with the last of them.

    A token is decoded together with those that completed the text before it, since decoders treat the first
    token of a text in their own way; what these alone give is left out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT:])
        self._context = len(self._window)

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._pending()
        if text.endswith(_HALF):
            return ""
        self._window = self._window[self._context :]
        self._context = len(self._window)
        return text

    def rest(self) -> str:
        """The whole characters that came with the first bytes of one that was never completed."""
        return self._pending().rstrip(_HALF)

    def _pending(self) -> str:
        known = self._decode(self._window[: self._context])
        return self._decode(self._window)[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class StopStrings:
    """Passes text on until a stop string ends in it, wherever the pieces of text begin and end.

    Of several stop strings that end at the same character the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            _, start = min(found)
            text, self._held = self._held[:start], ""
            return text
        return self._release(len(self._held) - self._possible_start())

    def rest(self) -> str:
        """What was held back, when no more text will come."""
        return self._release(len(self._held))

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max(map(len, self._stops), default=0))
        ends = (self._held[-length:] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
