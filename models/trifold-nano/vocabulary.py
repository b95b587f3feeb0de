"""Train the tokenizer and encode the corpus: python vocabulary.py --work DIR.

Reads DIR/train.jsonl and DIR/heldout.jsonl of collect.py.  Writes tokenizer.json, tokenizer_config.json and
generation_config.json beside this file, and the token files DIR/train.bin and DIR/heldout.bin (uint16).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from dialogue import ASSISTANT, USER, from_code, from_docs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
# A line break keeps the indentation after it; words may carry one space; digits stand alone.
PATTERN = r"\n+[ \t]*| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?=[ \t])|\s"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + '\n<|endoftext|>' }}"
    "{% else %}{{ '<|user|>\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DIALOGUE_BYTES = 2_500_000
SAMPLE_BYTES = 24_000_000


def shuffled(path: Path) -> list[dict[str, str]]:
    """Documents in a fixed random order."""
    rows: list[dict[str, str]] = [json.loads(line) for line in path.open()]
    return sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest())


def sample(rows: list[dict[str, str]]) -> Iterator[str]:
    """The leading documents up to SAMPLE_BYTES, each cut so that no single one dominates."""
    size = 0
    for row in rows:
        text = row["text"][:40_000]
        size += len(text)
        if size > SAMPLE_BYTES:
            return
        yield text


def train(rows: list[dict[str, str]], size: int) -> Tokenizer:
    """Byte-level BPE; the split pattern covers every character, so decoding gives back the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(rows), trainer)
    return tokenizer


def dialogues(rows: list[dict[str, str]]) -> Iterator[str]:
    """Dialogue documents, half from code and half from documentation, up to DIALOGUE_BYTES."""
    room = {"code": DIALOGUE_BYTES // 2, "docs": DIALOGUE_BYTES // 2}
    for row in rows:
        if room[row["kind"]] <= 0:
            continue
        for text in from_code(row["text"]) if row["kind"] == "code" else from_docs(row["text"]):
            room[row["kind"]] -= len(text)
            yield text


def encode(tokenizer: Tokenizer, texts: list[str], path: Path) -> int:
    """Write the tokens of all texts, each followed by the end token; returns their number."""
    end, total = tokenizer.token_to_id(END), 0
    with path.open("wb") as out:
        for start in range(0, len(texts), 500):
            for encoding in tokenizer.encode_batch_fast(texts[start : start + 500]):
                ids = np.asarray([*encoding.ids, end], dtype=np.uint16)
                out.write(ids.tobytes())
                total += len(ids)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    here = Path(__file__).parent
    config = json.loads((here / "config.json").read_text())
    rows, heldout = shuffled(args.work / "train.jsonl"), shuffled(args.work / "heldout.jsonl")
    tokenizer = train(rows, config["vocab_size"])
    tokenizer.save(str(here / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": TEMPLATE,
    }
    (here / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"eos_token_id": 0, "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
    (here / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    texts = [row["text"] for row in rows] + list(dialogues(rows))
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    count = encode(tokenizer, texts, args.work / "train.bin")
    kept = encode(tokenizer, [row["text"] for row in heldout], args.work / "heldout.bin")
    size = sum(len(text.encode()) for text in texts)
    print(f"train {count} tokens, {size} bytes, {size / count:.3f} bytes/token; held out {kept} tokens")


if __name__ == "__main__":
    main()
