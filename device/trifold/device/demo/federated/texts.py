"""The texts of three sites, plainly different, from what is installed with Python and Trifold.

code    Python source of SQLAlchemy, which Flower brings
manual  the manual pages of the standard library, as pydoc prints them
prose   the licences and descriptions of the packages that are installed
"""

from __future__ import annotations

import importlib
import pydoc
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from trifold.shared.errors import ConfigError

SITE_CHARACTERS: Final = 480_000
"""Of each site: equal parts of the pooled text."""

_DOCUMENT_CHARACTERS: Final = 12_000
"""Of each document at most, so that no site is a handful of long ones."""

_HELD_OUT: Final = 5
"""Every fifth document is held out."""

_MODULES: Final = (
    "argparse asyncio collections concurrent.futures configparser csv datetime decimal email.message enum "
    "fractions http.client imaplib inspect io ipaddress logging mailbox multiprocessing numbers os pathlib "
    "pickle random smtplib socket sqlite3 ssl statistics string subprocess tarfile tempfile threading "
    "tkinter turtle typing unittest unittest.mock urllib.request xml.dom.minidom zipfile"
)

_PACKAGES: Final = Path(sysconfig.get_paths()["purelib"])


def write_texts(folder: Path) -> dict[str, Path]:
    """Writes `folder/SITE/train` and `folder/SITE/heldout`; returns the folder of each site.

    Raises ConfigError when the packages that are read are not installed.
    """
    sites: dict[str, Callable[[], Iterator[str]]] = {"code": _code, "manual": _manual, "prose": _prose}
    for site, documents in sites.items():
        found = list(dict.fromkeys(document[:_DOCUMENT_CHARACTERS] for document in documents()))
        if len(found) < 2 * _HELD_OUT:
            raise ConfigError(f"too little text for the site {site}: install the extra 'federated'")
        random.Random(site).shuffle(found)  # noqa: S311 - an order, not a secret
        _write(folder / site, found)
    return {site: folder / site for site in sites}


def _write(folder: Path, documents: list[str]) -> None:
    for part in ("train", "heldout"):
        (folder / part).mkdir(parents=True)
    room = SITE_CHARACTERS
    for number, document in enumerate(documents):
        part = "heldout" if number % _HELD_OUT == 0 else "train"
        (folder / part / f"{number:04}.txt").write_text(document[:room], encoding="utf-8")
        room -= len(document[:room])
        if not room:
            break


def _code() -> Iterator[str]:
    for path in sorted((_PACKAGES / "sqlalchemy").rglob("*.py")):
        yield path.read_text(encoding="utf-8")


def _manual() -> Iterator[str]:
    for name in _MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # tkinter, where Python was built without it
        yield pydoc.plain(pydoc.render_doc(module))


def _prose() -> Iterator[str]:
    for package in sorted(_PACKAGES.glob("*.dist-info")):
        _, _, description = (package / "METADATA").read_text(encoding="utf-8").partition("\n\n")
        yield description
        for path in sorted(package.rglob("*")):
            if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                yield path.read_text(encoding="utf-8", errors="replace")
