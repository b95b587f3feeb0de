"""What crosses the links of a federated run, recorded and searched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tests.network.ways import Ways
from trifold.cloud.split.split import split
from trifold.device.demo.federated.federation import Federation
from trifold.shared.bundle.manifest import Cuts
from trifold.shared.model.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
NANO = ROOT / "models" / "trifold-nano"

SETTINGS = (
    "sites=1",
    "rounds=1",
    "local.steps=2",
    "local.sequences=2",
    "local.length=64",
    "local.evaluate=1",
)

CHARACTERS = 20
IDS = 6
"""So many in a row, as bytes, do not come about by chance."""


def found(sent: bytes, pieces: set[bytes]) -> set[bytes]:
    """Those of the pieces, which are equally long, that are in what was sent."""
    length = len(next(iter(pieces)))
    return pieces & {sent[at : at + length] for at in range(len(sent) - length + 1)}


def of_text(text: str) -> set[bytes]:
    data = text.encode()
    pieces = (data[at : at + CHARACTERS] for at in range(len(data) - CHARACTERS))
    return {piece for piece in pieces if len(set(piece)) > CHARACTERS // 2}


def of_ids(ids: NDArray[np.int64]) -> Iterator[set[bytes]]:
    """Token ids in a row, in every integer type that holds them."""
    for dtype in ("<u2", ">u2", "<u4", ">u4", "<u8", ">u8"):
        wide = ids.astype(dtype)
        yield {wide[at : at + IDS].tobytes() for at in range(len(ids) - IDS)}
    by_length: dict[int, set[bytes]] = {}
    for at in range(len(ids) - IDS):
        piece = b"".join(varint(int(number)) for number in ids[at : at + IDS])
        by_length.setdefault(len(piece), set()).add(piece)
    yield from (pieces for length, pieces in by_length.items() if length > IDS + 2)


def varint(number: int) -> bytes:
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def test_no_byte_run_on_any_link_of_a_federated_run_carries_text_or_token_ids(tmp_path: Path) -> None:
    text = (NANO / "heldout.txt").read_text(encoding="utf-8")[:12_000]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text(text, encoding="utf-8")
    bundle, run = tmp_path / "bundle", tmp_path / "run"
    split(Checkpoint.open(NANO), Cuts(edge=2, cloud=5), bundle, train=True)
    with (
        Ways() as ways,
        Federation(
            tmp_path / "f", bundle, {"clinic": tmp_path / "text"}, ROOT / "deploy" / "flower", ways
        ) as federation,
    ):
        federation.federate("run", str(run), *(word for item in SETTINGS for word in ("--set", item)))
    sent = b"".join(ways.recorded)
    # Both links were recorded: two steps of rows and gradients to the training process, factors to Flower.
    assert len(ways.proxies) == 2
    assert all(proxy.bytes_up > 100_000 for proxy in ways.proxies)

    ids = np.array(Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(text).ids)
    assert found(sent, of_text(text)) == set()
    assert [found(sent, pieces) for pieces in of_ids(ids)] == [set() for _ in of_ids(ids)]
    # The search would have found them.
    assert found(sent[:1000] + text[500:560].encode(), of_text(text))
    assert all(
        any(found(sent[:1000] + row, pieces) for pieces in of_ids(ids))
        for row in (ids[50:60].astype("<u4").tobytes(), b"".join(varint(int(n)) for n in ids[50:60]))
    )
