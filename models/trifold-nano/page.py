"""HTML documentation page to plain text: headings, prose, lists, and code blocks with their indentation."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = frozenset(
    ("area", "base", "br", "col", "hr", "img", "input", "link", "meta", "param", "source", "wbr")
)
DROPPED = frozenset(
    (
        "script",
        "style",
        "head",
        "nav",
        "footer",
        "form",
        "button",
        "select",
        "svg",
        "aside",
        "title",
        "noscript",
    )
)
BLOCKS = frozenset(
    "p div section article main ul ol dl li dt dd table tr blockquote h1 h2 h3 h4 h5 h6 pre figure "  # noqa: SIM905
    "header".split()
)
# Sphinx, Doxygen, mkdocs, rustdoc and DocBook name their furniture with these words.
FURNITURE = re.compile(
    r"sidebar|related|navigation|nav-|navbar|navheader|navfooter|breadcrumb|headerlink|footer|toctree|topnav"
    r"|menu|clearer|viewcode|searchbox|prev-next|contents-local|linenos|quickview|langmenu|skip-"
    r"|copybtn|footnotes|back-to-top|toc-|toplang|path$"
)
BODY = re.compile(r"(^|\s)(body|document-content|main|md-content|docstring|sect1|chapter)(\s|$)")

BANNER = re.compile(
    r"^(Back to top|Toggle table of contents sidebar|Small\. Fast\. Reliable\.|Choose any three\.)$",
    re.MULTILINE,
)


class Page(HTMLParser):
    """Collects the text of one page; ``text()`` gives the cleaned result."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.body: list[str] = []
        # One entry for each open element: its tag, whether it is dropped, whether it is the body.
        self.open: list[tuple[str, bool, bool]] = []
        self.hidden = self.inside = self.verbatim = 0
        self.feed(html)
        self.close()

    def emit(self, piece: str) -> None:
        """Append to the page, and to the body while inside it."""
        self.parts.append(piece)
        if self.inside:
            self.body.append(piece)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            if tag == "br" and not self.hidden:
                self.emit("\n")
            return
        named = dict(attrs)
        label = f"{named.get('class') or ''} {named.get('id') or ''}"
        dropped = tag in DROPPED or bool(FURNITURE.search(label)) or named.get("role") == "navigation"
        body = tag in ("main", "article") or named.get("role") == "main" or bool(BODY.search(label))
        self.open.append((tag, dropped, body))
        self.hidden += dropped
        self.inside += body
        if self.hidden:
            return
        if tag == "pre":
            self.emit("\n\n")
            self.verbatim += 1
        elif tag in BLOCKS:
            self.emit("\n" if tag in ("li", "tr", "dd", "dt") else "\n\n")
        if tag == "li":
            self.emit("- ")
        elif tag in ("td", "th"):
            self.emit("  ")
        elif len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.emit("#" * int(tag[1]) + " ")
        elif tag == "code" and not self.verbatim:
            self.emit("`")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or all(tag != name for name, _, _ in self.open):
            return
        while self.open:
            name, dropped, body = self.open.pop()
            if not self.hidden:
                if name == "pre":
                    self.verbatim -= 1
                if name in BLOCKS:
                    self.emit("\n" if name in ("li", "tr", "dd", "dt") else "\n\n")
                elif name == "code" and not self.verbatim:
                    self.emit("`")
            self.hidden -= dropped
            self.inside -= body
            if name == tag:
                break

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        # Marked so that the clean-up leaves the line structure of code alone.
        self.emit("\0" + data + "\0" if self.verbatim else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """The cleaned text of the body if the page marks one, else of the page."""
        body = "".join(self.body)
        raw = body if len(body) > 200 else "".join(self.parts)
        pieces = re.split("\0([^\0]*)\0", raw)
        for i in range(0, len(pieces), 2):
            pieces[i] = re.sub(r" *\n *", "\n", re.sub(r" {2,}", "  ", pieces[i]))
        text = "".join(pieces).replace("\0", "").replace("\u00b6", "").replace("\u00a0", " ")
        text = re.sub(r"[ \t]+\n", "\n", text).replace("``", "")
        text = re.sub(r"\n-\s*\n+", "\n- ", text)
        text = BANNER.sub("", text)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
