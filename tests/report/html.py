"""A page read strictly: every element closed, every name once, every link to a place in it, nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}
MADE_OF = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "h1", "h2", "h3", "p", "a"),
    *("div", "span", "b", "i", "sup", "br", "code", "pre", "img", "ul", "li", "dl", "dt", "dd", "details", "summary"),
    *("table", "thead", "tbody", "tr", "th", "td", "svg", "g", "path", "defs", "use", "text", "clippath", "rect"),
}


class Page(HTMLParser):
    """What is on a page.

    Attributes:
        tags: every kind of element.
        ids: names of elements.
        addresses: what links and pictures point to.
        attributes: names of all attributes.
        words: all text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        self.attributes |= set(names)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name in ("href", "src", "xlink:href", "action", "data"):
                self.addresses.append(str(value))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes {self._open[-1]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.words += data


def checked(text: str) -> Page:
    """Return a page that is sound, and whole without a network."""
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert page.tags <= MADE_OF, f"not ours: {page.tags - MADE_OF}"
    assert not [name for name in page.attributes if name.startswith("on")]
    assert len(page.ids) == len(set(page.ids)), "a name is given twice"
    for address in page.addresses:
        assert address.startswith("data:image/") or address.removeprefix("#") in page.ids, address
    named = re.findall(r"url\(([^)]*)\)", text)
    assert all(name.removeprefix("#") in page.ids for name in named), "a style points elsewhere"
    assert "@import" not in text
    return page
