"""Short question-and-answer documents cut out of the training text, so that chat prompts mean something."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

USER, ASSISTANT = "<|user|>", "<|assistant|>"


def from_code(text: str) -> Iterator[str]:
    """A request for every documented function of 4 to 30 lines, answered by the function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.end_lineno is None:
            continue
        purpose = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
        if not 15 <= len(purpose) <= 200 or not 4 <= node.end_lineno - node.lineno <= 30:
            continue
        body = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        purpose = purpose[0].lower() + purpose[1:].rstrip(".")
        yield f"{USER}\nWrite a Python function `{node.name}`: {purpose}.\n{ASSISTANT}\n{body}\n"


def from_docs(text: str) -> Iterator[str]:
    """A question for every section that opens with a paragraph of prose, answered by the paragraph."""
    for match in re.finditer(r"^#+ +([^\n]{4,60})\n\n((?:[^\n]+\n)+)", text, re.MULTILINE):
        title, answer = match.group(1).strip().rstrip(".:?"), match.group(2).strip()
        if 120 <= len(answer) <= 900 and answer[0].isupper() and answer[-1] == ".":
            yield f"{USER}\nExplain: {title}\n{ASSISTANT}\n{answer}\n"
