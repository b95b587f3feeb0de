"""Mutations of what a caller says: of a field, of bytes, and of the order of messages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import DecodeError, Message

from trifold.shared.session.channel import MESSAGE_BYTES

Said: TypeAlias = tuple[bytes | None, ...]
"""Messages of a caller, one after the other; with None it hangs up and calls once more."""

_MOST_MESSAGES: Final = 24
_GIANT: Final = 1 / 1000
"""How often there is a message of about the largest size, which takes its time to send."""

_WHOLE: Final = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    63,
    64,
    65,
    255,
    511,
    512,
    513,
    1024,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
_WIDE: Final = (*_WHOLE, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_NUMBERS: Final = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
_TEXTS: Final = (
    "",
    "\0",
    "x" * 5000,
    "\U0001f600" * 50,
    "../../etc/passwd",
    "{{ 1/0 }}",
    "a\u0301\u200b\ufeff",
    "user",
)
_BYTES: Final = (
    b"",
    b"\0",
    b"\xff" * 4,
    b"\x00\x00\xc0\x7f" * 64,
    b"\xff\xff\x7f\x7f" * 64,
    b"\x7f" * 340,
    bytes(9000),
)
_FRAGMENTS: Final = (
    b"\xff" * 10,  # a number that does not end
    b"\x0a" * 200,  # messages in messages
    b"\x0b" * 200,  # groups in groups
    b"\x0c",  # the end of a group that did not begin
    b"\x0a\xff\xff\xff\xff\x0f",  # a length of 4 GiB
    b"\x0a\x02\xc3\x28",  # text that is not UTF-8
    b"\x00",  # field number 0
)


class Mutator:
    """Of messages of one `kind`. Whatever it makes follows from `seed` and from what it is given."""

    def __init__(self, kind: type[Message], seed: int) -> None:
        self.random = random.Random(seed)
        self._kind = kind

    def mutated(self, said: Said, others: Sequence[Said], *, stream: bool) -> Said:
        """Said otherwise, by one to four changes; `others` lend messages and fields."""
        changes = [*[self._in_a_field] * 4, *[self._in_bytes] * 2, *[self._in_order] * (2 * stream)]
        for _ in range(self.random.choice([1, 1, 1, 2, 2, 3, 4])):
            said = self.random.choice(changes)(said, self.random.choice(others))
        return said[:_MOST_MESSAGES]

    def _in_order(self, said: Said, other: Said) -> Said:
        chance, messages = self.random, list(said)
        at, to = chance.randrange(len(messages) + 1), chance.randrange(len(messages) + 1)
        match chance.randrange(7):
            case 0:
                del messages[at : at + 1]
            case 1:
                messages[at:at] = messages[to : to + chance.randrange(1, 4)]
            case 2:
                messages = messages[:at] + list(other)[to:]
            case 3:
                messages[at:at] = [None]
            case 4:
                messages[at:at] = [None, *messages[:1]]
            case 5:
                chance.shuffle(messages)
            case 6:
                messages[at:at] = [chance.choice(other or (b"",))]
        return tuple(messages)

    def _in_bytes(self, said: Said, other: Said) -> Said:
        return self._changed(said, lambda message: self._damaged(message, other))

    def _in_a_field(self, said: Said, other: Said) -> Said:
        return self._changed(said, lambda message: self._refilled(message, other))

    def _changed(self, said: Said, change: Callable[[bytes], bytes]) -> Said:
        places = [place for place, message in enumerate(said) if message is not None]
        if not places:
            return (change(b""),)
        # The later ones are where state is: each is as likely as all those before it that are left.
        place = places[-1] if self.random.random() < 0.5 else self.random.choice(places)
        message = said[place]
        assert message is not None
        return (*said[:place], change(message), *said[place + 1 :])

    def _damaged(self, message: bytes, other: Said) -> bytes:
        chance, data = self.random, bytearray(message)
        at = chance.randrange(len(data) + 1)
        match chance.randrange(8):
            case 0 if data:
                data[at - 1] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + chance.randrange(1, 9)]
            case 3:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                data[at:at] = chance.choice(_FRAGMENTS)
            case 5:
                data += chance.choice([*(one for one in other if one), b"\x08\x01"])
            case 6:
                data = bytearray(chance.randbytes(chance.randrange(200)))
            case _:
                data[at : at + 4] = chance.choice(_BYTES)[:64]
        if chance.random() < _GIANT:
            data += bytes(max(0, MESSAGE_BYTES - len(data) + chance.randrange(-100, 100)))
        return bytes(data)

    def _refilled(self, message: bytes, other: Said) -> bytes:
        try:
            whole = self._kind.FromString(message)
        except DecodeError:
            return self._damaged(message, other)
        holder, field = self.random.choice([*_fields(whole)] or [(whole, None)])
        if field is None:  # a message without fields
            return self._damaged(message, other)
        if self.random.random() < 0.15:
            holder.ClearField(field.name)
        elif self.random.random() < 0.2 and (found := [*self._lent(holder, other)]):
            holder.CopyFrom(self.random.choice(found))
        elif field.is_repeated:
            self._refill_list(getattr(holder, field.name), field)
        elif field.message_type:
            getattr(holder, field.name).SetInParent()
        else:
            setattr(holder, field.name, self._value(field, getattr(holder, field.name)))
        return whole.SerializeToString()

    def _refill_list(self, values: Any, field: Field) -> None:
        chance = self.random
        match chance.randrange(4):
            case 0:
                del values[chance.randrange(len(values) + 1) :]
            case 1:
                values.MergeFrom([*values] * chance.choice([1, 1, 1, 200]))
            case 2 if values and not field.message_type:
                values[chance.randrange(len(values))] = self._value(field, values[0])
            case _ if field.message_type:
                values.add()
            case _:
                values.append(self._value(field, "" if field.type == Field.TYPE_STRING else 0))

    def _lent(self, holder: Message, other: Said) -> Iterator[Message]:
        """Messages of the holder's kind in `other`."""
        for message in other:
            try:
                whole = self._kind.FromString(message or b"")
            except DecodeError:
                continue
            yield from (found for found, _ in _fields(whole) if found.DESCRIPTOR == holder.DESCRIPTOR)

    def _value(self, field: Field, now: Any) -> Any:
        chance = self.random
        match field.cpp_type:
            case Field.CPPTYPE_UINT32:
                return chance.choice([*_WHOLE, (now + 1) % 2**32, (now - 1) % 2**32])
            case Field.CPPTYPE_UINT64:
                return chance.choice([*_WIDE, (now + 1) % 2**64, (now - 1) % 2**64, chance.getrandbits(64)])
            case Field.CPPTYPE_FLOAT | Field.CPPTYPE_DOUBLE:
                return chance.choice(_NUMBERS)
            case Field.CPPTYPE_BOOL:
                return not now
            case Field.CPPTYPE_ENUM:
                return chance.choice([-(2**31), -1, 0, 1, 2, 3, 4, 99, 2**31 - 1])
            case _ if field.type == Field.TYPE_STRING:
                return chance.choice([*_TEXTS, now + "x", now[:-1], now * 2, now.upper()])
            case _:
                return chance.choice(
                    [*_BYTES, now + b"x", now[:-1], now[1:], now * 2, chance.randbytes(len(now))]
                )


def _fields(message: Message) -> Iterator[tuple[Message, Field]]:
    """Every field of a message and of those within it, set or not, with what holds it."""
    field: Any  # its type has two names
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type and not field.is_repeated and message.HasField(field.name):
            yield from _fields(getattr(message, field.name))
        elif field.message_type and field.is_repeated:
            for each in getattr(message, field.name):
                yield from _fields(each)
