"""The packages the corpus is built from, and the check of their licences."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

# Debian packages. Their machine-readable copyright file must name a permissive licence for "Files: *".
DOCS = """
python-django-doc python-sqlalchemy-doc python-scipy-doc python-pandas-doc python-sympy-doc
python-astropy-doc python-flask-doc python-werkzeug-doc python-click-doc python-requests-doc
python-aiohttp-doc python-tornado-doc twisted-doc python-pytest-doc python-attr-doc python-ipython-doc
sphinx-doc python-pygments-doc python-babel-doc numba-doc cython-doc python-dask-doc python-distributed-doc
python-cryptography-doc python-mako-doc python-peewee-doc python-fonttools-doc python-h5py-doc
python-pymongo-doc docutils-doc python-djangorestframework-doc python-markdown-doc python-bs4-doc nodejs-doc
postgresql-doc-15 sqlite3-doc apache2-doc  python-xarray-doc python-jsonschema-doc python-black-doc
nova-doc keystone-doc cinder-doc glance-doc swift-doc neutron-doc ironic-doc heat-doc python-oslo.db-doc
python-oslo.config-doc python-taskflow-doc python-nbconvert-doc python-traitlets-doc python-doit-doc
python-cmd2-doc python-cachelib-doc python-colorzero-doc python-ezdxf-doc python-parso-doc
python-flask-security-doc python-tables-doc llvm-14-doc h2o-doc python-structlog-doc python-tenacity-doc
python-sortedcontainers-doc python-wtforms-doc python-pint-doc python-uvicorn-doc python-blinker-doc
python-cbor2-doc python-itsdangerous-doc python-graphql-core-doc
""".split()  # noqa: SIM905
CODE = """
python3-django python3-sqlalchemy python3-scipy python3-sklearn python3-networkx python3-sympy
python3-astropy python3-flask python3-werkzeug python3-click python3-requests python3-aiohttp
python3-tornado python3-twisted python3-pytest python3-attr python3-pydantic python3-starlette python3-pip
tox black python3-mypy python3-ipython python3-sphinx python3-pygments python3-babel python3-gunicorn
python3-trio python3-anyio python3-numba python3-dask python3-distributed python3-nova python3-keystone
python3-cinder python3-glance python3-swift python3-neutron python3-redis python3-nltk python3-statsmodels
python3-cryptography python3-urllib3 alembic python3-mako python3-peewee python3-pyparsing python3-rich
python3-fonttools python3-notebook python3-h5py python3-skimage python3-pymongo python3-docutils
python3-wtforms python3-djangorestframework python3-poetry python3-hatchling python3-simplejson
python3-cherrypy3 python3-pycodestyle python3-isort python3-joblib python3-markdown python3-bs4
python3-blinker python3-openssl python3-xarray python3-jsonschema python3-traitlets python3-nbconvert
python3-structlog python3-websockets python3-jedi python3-parso python3-prompt-toolkit python3-marshmallow
python3-falcon python3-zarr python3-seaborn python3-kombu python3-scrapy python3-imageio
python3-oslo.messaging python3-oslo.db python3-oslo.config python3-taskflow python3-tables python3-textual
python3-pandas
""".split()  # noqa: SIM905
# Permissive too, but their copyright file has no plain "Files: *" entry: read by hand, named here.
READ_BY_HAND = {
    "python3.11-doc": "PSF-2.0",
    "cargo-doc": "MIT or Apache-2.0",
    "rust-doc": "MIT or Apache-2.0",
    "python-jinja2-doc": "BSD-3-Clause",
    "python3-jinja2": "BSD-3-Clause",
    "python3-yaml": "MIT",
    "python3-numpy": "BSD-3-Clause",
    "python3-matplotlib": "Matplotlib (PSF-style)",
    "python3-fastapi": "MIT",
    "python3-more-itertools": "MIT",
    "python3-astropy": "BSD-3-Clause",
    "python-astropy-doc": "BSD-3-Clause",
}
PERMISSIVE = re.compile(
    r"expat|mit\b|mit/|bsd|apache|psf|python|isc|postgresql|public-domain|0bsd|zlib|unlicense|matplotlib|x11",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"gpl|gfdl|cc-by|mpl|ofl|epl|cddl|cecill|artistic|eupl", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """What a package allows: the licence of its bulk, and path patterns under any other terms."""

    name: str
    excluded: tuple[str, ...]

    def covers(self, path: str) -> bool:
        """Whether the file at ``path`` inside the package falls under the bulk licence."""
        return not any(fnmatch.fnmatch(path, "*" + pattern) for pattern in self.excluded)


def read_licence(package: str, root: Path) -> Licence:
    """Licence of an unpacked Debian package; ``ValueError`` unless its bulk is permissive."""
    files = sorted(root.glob("usr/share/doc/*/copyright"))
    if not files:
        raise ValueError(f"{package}: no copyright file")
    bulk, excluded = READ_BY_HAND.get(package, ""), []
    for stanza in re.split(r"\n\s*\n", files[0].read_text(errors="replace")):
        globs = re.search(r"^Files:\s*((?:.|\n[ \t])*)", stanza, re.MULTILINE)
        terms = re.search(r"^License:[ \t]*(.*)$", stanza, re.MULTILINE)
        if not globs or not terms:
            continue
        patterns = globs.group(1).split()
        if "*" in patterns:
            bulk = bulk or terms.group(1).strip()
        elif COPYLEFT.search(terms.group(1)):
            excluded += [re.sub(r"^(src|lib|Lib|docs?)/", "", p) for p in patterns]
    if not PERMISSIVE.search(bulk) or COPYLEFT.search(bulk):
        raise ValueError(f"{package}: bulk licence {bulk!r} is not permissive")
    return Licence(bulk, tuple(p for p in excluded if p != "debian/*"))
