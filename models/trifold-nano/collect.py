"""Gather, clean, deduplicate and split the corpus: python collect.py --work DIR [--heldout FILE].

Reads the standard library of the running Python and the Debian packages of sources.py (downloaded by
apt-get when they are not in DIR/deb).  Writes DIR/train.jsonl, DIR/heldout.jsonl and DIR/sources.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path

from page import Page
from sources import CODE, DOCS, READ_BY_HAND, read_licence

CAP_CODE, CAP_DOCS, CAP_TESTS = 1_800_000, 3_500_000, 3_000_000
HELDOUT_BYTES = 100_000
SKIPPED = re.compile(
    r"/(genindex|py-modindex|search|_modules|_sources|_static|_downloads|vendor|_vendor|vendored|external|externals"
    r"|extern|third_party|locale|locales|migrations|implementors|print|all|help|site-packages|idlelib|lib2to3|pydoc_data"
    r"|encodings|unicodedata|releasenotes|changelog|changes|release)([./_-]|\d|$)",
    re.IGNORECASE,
)

# The rest of rust-doc is generated interface pages by the ten thousand.
RUST_BOOKS = re.compile(r"/(book|reference|nomicon|rust-by-example|edition-guide)/")


@dataclass
class Document:
    """One file of the corpus."""

    source: str
    path: str
    kind: str
    text: str


def clean(text: str) -> str | None:
    """Normal line ends and no trailing blanks; None for text that is a table, data or noise."""
    text = text.replace("\r\n", "\n").replace("\t", "    ").replace("\ufeff", "")
    text = re.sub(r"[ \t]+\n", "\n", text).strip() + "\n"
    if not 300 <= len(text) <= 300_000 or "\ufffd" in text or "<|" in text:
        return None
    lines = text.split("\n")
    digits = sum(ch.isdigit() for ch in text)
    foreign = sum(ord(ch) > 126 for ch in text)
    if digits > 0.15 * len(text) or foreign > 0.03 * len(text) or len(text) > 140 * len(lines) * 3:
        return None
    # Long unbroken runs are base64, hashes or generated tables.
    if len(re.findall(r"[^\s]{120,}", text)) > 3 or max(map(len, lines)) > 6000:
        return None
    escapes = ("0x", '"\\', "'\\", "b'\\", "(0x")
    return None if sum(line.lstrip().startswith(escapes) for line in lines) > 0.3 * len(lines) else text


def unpack(package: str, work: Path) -> tuple[Path, str]:
    """Directory of the unpacked package and its version, downloading and unpacking when missing."""
    archives = work / "deb"
    archives.mkdir(parents=True, exist_ok=True)
    if not list(archives.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", "-qq", package], cwd=archives, check=True)  # noqa: S607
    archive = sorted(archives.glob(f"{package}_*.deb"))[-1]
    root = work / "x" / package
    if not root.exists():
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)  # noqa: S607
    return root, archive.name.split("_")[1].replace("%3a", ":")


def read(path: Path, kind: str) -> str | None:
    """Clean text of one file, or None."""
    try:
        raw = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return clean(Page(raw).text() if kind == "docs" else raw)


def spread(paths: list[Path]) -> list[Path]:
    """A fixed shuffle, so that a cap takes an even sample of the package."""
    return sorted(paths, key=lambda p: hashlib.sha256((p.name + str(p.parent)[-40:]).encode()).digest())


def gather(job: tuple[str, str, Path]) -> tuple[dict[str, str | int], list[Document]]:
    """Documents of one package and its row in the table of sources."""
    package, kind, work = job
    root, version = unpack(package, work)
    licence = read_licence(package, root)
    wanted = ".py" if kind == "code" else ".html"
    cap, documents, size = (CAP_CODE if kind == "code" else CAP_DOCS), [], 0
    if package in ("python3.11-doc", "postgresql-doc-15"):
        cap *= 4
    files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    for path in spread([p for p in files if p.name.endswith((wanted, wanted + ".en"))]):
        inner = "/" + str(path.relative_to(root))
        if SKIPPED.search(inner) or re.search(r"/tests?/|/test_", inner) or not licence.covers(inner):
            continue
        if package == "rust-doc" and not RUST_BOOKS.search(inner):
            continue
        text = read(path, kind)
        if text is None:
            continue
        documents.append(Document(package, inner, kind, text))
        size += len(text.encode())
        if size > cap:
            break
    return {"name": package, "version": version, "licence": licence.name, "kind": kind}, documents


def standard_library() -> tuple[dict[str, str | int], list[Document]]:
    """The standard library of the running Python, its tests capped."""
    root, documents, tests = Path(sysconfig.get_path("stdlib")), [], 0
    for path in spread(list(root.rglob("*.py"))):
        inner = "/" + str(path.relative_to(root))
        if SKIPPED.search(inner):
            continue
        is_test = "/test" in inner
        if is_test and tests > CAP_TESTS:
            continue
        text = read(path, "code")
        if text is not None:
            tests += len(text) if is_test else 0
            documents.append(Document("python-stdlib", inner, "code", text))
    version = sysconfig.get_config_var("py_version") or sysconfig.get_python_version()
    return {"name": "python-stdlib", "version": version, "licence": "PSF-2.0", "kind": "code"}, documents


def long_lines(text: str) -> set[bytes]:
    """Hashes of the lines long enough to identify a text."""
    lines = {" ".join(line.split()) for line in text.split("\n")}
    return {hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines if len(line) >= 32}


def unique(documents: list[Document]) -> Iterator[tuple[Document, set[bytes]]]:
    """Drop documents half of whose long lines were already seen, and repeated licence headers with them."""
    seen: set[bytes] = set()
    for document in documents:
        marks = long_lines(document.text)
        if marks and len(marks & seen) < 0.5 * len(marks):
            seen |= marks
            yield document, marks


def split(kept: list[tuple[Document, set[bytes]]]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents without near-duplicates between them.

    Training documents keep less than a fifth of their long lines in common with held-out; held-out documents
    that still find two fifths of theirs scattered over training are given up.
    """
    room, chosen, marks = {"code": HELDOUT_BYTES, "docs": HELDOUT_BYTES}, set(), set()
    order = sorted(range(len(kept)), key=lambda i: hashlib.sha256(kept[i][0].text.encode()).digest())
    for i in order:
        document, lines = kept[i]
        size = len(document.text.encode())
        if 1500 <= size <= 12_000 and size <= room[document.kind]:
            room[document.kind] -= size
            chosen.add(i)
            marks |= lines
    train = [(d, m) for i, (d, m) in enumerate(kept) if i not in chosen and len(m & marks) < 0.2 * len(m)]
    shared = marks & set().union(*(m for _, m in train))
    heldout = [kept[i] for i in order if i in chosen]
    return [d for d, _ in train], [d for d, m in heldout if len(m & shared) < 0.4 * len(m)]


def strip_header(document: Document) -> Document:
    """Remove the comment block of licence boilerplate that opens most Python files of some packages."""
    if document.kind == "code":
        match = re.match(r"(?:#[^\n]*\n|\n)+", document.text)
        if match and re.search(r"licen[sc]e|copyright", match.group(0), re.IGNORECASE):
            document.text = document.text[match.end() :]
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, default=Path(__file__).parent / "heldout.txt")
    args = parser.parse_args()
    by_hand = [(p, "docs" if p.endswith("-doc") else "code") for p in READ_BY_HAND]
    jobs = dict([*((p, "docs") for p in DOCS), *((p, "code") for p in CODE), *by_hand])
    with Pool(2) as pool:
        found = pool.map(gather, [(p, kind, args.work) for p, kind in jobs.items()], chunksize=1)
    found.insert(0, standard_library())
    documents = [strip_header(d) for _, group in found for d in group]
    train, heldout = split(list(unique(documents)))
    for name, part in (("train", train), ("heldout", heldout)):
        with (args.work / f"{name}.jsonl").open("w") as out:
            out.writelines(json.dumps(asdict(d)) + "\n" for d in part)
    args.heldout.write_text("<|endoftext|>\n".join(d.text for d in heldout))
    rows = [row for row, _ in found]
    for row in rows:
        row["bytes"] = sum(len(d.text.encode()) for d in train if d.source == row["name"])
    (args.work / "sources.json").write_text(json.dumps([r for r in rows if r["bytes"]], indent=1))
    totals = {k: sum(len(d.text.encode()) for d in train if d.kind == k) for k in ("code", "docs")}
    print(f"{len(train)} documents {totals}, held out {len(heldout)} ({args.heldout.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
