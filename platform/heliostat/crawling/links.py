"""HTML as strangers write it -> the images it shows, and what it says about their use.

The parser is libxml2's, event by event: no tree, so that neither depth nor size nor a million attributes costs more than one
walk (a tree builder took minutes for 2 MB of distinct attributes). Text in scripts, comments and text areas is no markup.
"""

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lxml import etree  # type: ignore[import-untyped]

LAZY_ATTRIBUTES = ("data-src", "data-original", "data-lazy-src", "data-lazy", "data-url", "data-hi-res-src", "data-full-src")
"""Where scripts that load images late keep the true URL."""
SRCSET_ATTRIBUTES = ("srcset", "data-srcset", "data-lazy-srcset")
_WEB_ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "ascii", "gb2312", "gbk", "gb18030", "big5", "euc_jp", "euc_kr",
                  "shift_jis", "iso2022_jp", "koi8-r", "koi8-u", "tis-620", "cp874", "mac-roman")  # fmt: skip
_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)
_CHARSET_WITHIN_BYTES = 4096  # browsers look at 1024
_SPACE = "\t\n\f\r "
_MAX_TEXT_CHARACTERS = 1024
_MAX_ATTRIBUTE_CHARACTERS = 2**16
_MAX_CANDIDATES = 64
_FEED_BYTES = 2**16


@dataclass(frozen=True)
class Candidate:
    """One size of an image. url: as written; weight: the higher, the better, within one image."""

    url: str
    weight: tuple[int, float]


@dataclass
class PageImage:
    """One image of a page with all sizes that are offered; alt: its description."""

    alt: str = ""
    candidates: list[Candidate] = field(default_factory=list)


@dataclass
class PageLinks:
    """What a page shows. base: of relative URLs, as written; licence: of the page, as written; words: of its robots metas."""

    images: list[PageImage] = field(default_factory=list)
    base: str = ""
    licence: str = ""
    robots: list[tuple[str, str]] = field(default_factory=list)
    """(name of the meta, its content): names are "robots", an agent's token, or "tdm-reservation"."""


def page_links(html: bytes, content_type: str = "") -> PageLinks:
    """All images of a page, in its order. Any bytes are a page; most show nothing."""
    target = _Target()
    parser = etree.HTMLParser(target=target, encoding="utf-8", no_network=True, huge_tree=True)
    text = _as_utf8(html, content_type)
    try:
        for start in range(0, len(text), _FEED_BYTES):
            parser.feed(text[start : start + _FEED_BYTES])
        parser.close()
    except etree.LxmlError:  # nothing at all in it, or damage that libxml2 gives up on: what was seen until then counts
        return target.page
    return target.page


class _Target:
    """Receives the parser's events; the names of its methods are lxml's."""

    def __init__(self) -> None:
        self.page = PageLinks()
        self._picture: PageImage | None = None

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "img":
            self._add_image(attributes)
        elif tag == "picture":
            self._picture = PageImage()
        elif tag == "source" and self._picture is not None:
            self._picture.candidates += _of_srcsets(attributes)
        elif tag == "base" and not self.page.base:
            self.page.base = _text(attributes.get("href"))
        elif tag == "meta":
            name = _text(attributes.get("name")).strip().lower()
            if name and len(self.page.robots) < _MAX_CANDIDATES:
                self.page.robots.append((name, _text(attributes.get("content"))))
        elif tag in ("a", "link") and not self.page.licence and "license" in _text(attributes.get("rel")).lower().split():
            self.page.licence = _text(attributes.get("href"))

    def end(self, tag: str) -> None:
        if tag == "picture":
            self._close_picture()

    def close(self) -> None:
        self._close_picture()

    def _close_picture(self) -> None:
        if self._picture is not None and self._picture.candidates:
            self.page.images.append(self._picture)  # sources without an img: nothing is shown, and the links are counted
        self._picture = None

    def _add_image(self, attributes: Mapping[str, str]) -> None:
        image, self._picture = self._picture or PageImage(), None
        image.alt = _text(attributes.get("alt"))
        image.candidates += _of_srcsets(attributes)
        lazy = [attributes.get(name) for name in LAZY_ATTRIBUTES]
        image.candidates += [Candidate(_url(value), (1, 0.0)) for value in lazy if value]
        source = attributes.get("src")
        if source:
            image.candidates.append(Candidate(_url(source), (0, 0.0)))
        if image.candidates:
            self.page.images.append(image)


def _text(value: str | None) -> str:
    return (value or "")[:_MAX_TEXT_CHARACTERS]


def _url(value: str) -> str:
    """Longer than any limit stays longer than any limit."""
    return value.strip(_SPACE)[: _MAX_ATTRIBUTE_CHARACTERS + 1]


def _of_srcsets(attributes: Mapping[str, str]) -> list[Candidate]:
    values = [attributes.get(name) for name in SRCSET_ATTRIBUTES]
    return [candidate for value in values if value for candidate in parse_srcset(value)]


def parse_srcset(text: str) -> list[Candidate]:
    """The candidates of a srcset attribute (HTML 4.8.4.2.2), URLs with commas inside included; at most 64.

    weight: (2, width in pixels or density); a candidate without a descriptor has density 1.
    """
    found, rest = list[Candidate](), text[:_MAX_ATTRIBUTE_CHARACTERS]
    while len(found) < _MAX_CANDIDATES:
        rest = rest.lstrip(_SPACE + ",")
        if not rest:
            break
        end = next((place for place, sign in enumerate(rest) if sign in _SPACE), len(rest))
        url, rest = rest[:end], rest[end:]
        descriptor = ""
        if not url.endswith(","):
            descriptor, rest = _descriptor(rest)
        found.append(Candidate(url.rstrip(","), (2, _weight(descriptor))))
    return found


def _descriptor(text: str) -> tuple[str, str]:
    """What stands before the next comma outside of brackets, and what comes after it."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")" and depth > 0)
        if sign == "," and depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _weight(descriptor: str) -> float:
    match = re.search(r"(?:^|[\t\n\f\r ])([0-9]{1,6}(?:\.[0-9]{1,4})?)[wx](?:$|[\t\n\f\r ])", descriptor)
    return float(match[1]) if match else 1.0


def _as_utf8(html: bytes, content_type: str) -> bytes:
    """The bytes in UTF-8: by mark, header, meta, in this order. An encoding that no page should name counts as UTF-8."""
    if html.startswith((b"\xff\xfe", b"\xfe\xff")):
        return html.decode("utf-16", "replace").encode("utf-8", "replace")
    header = _HEADER_CHARSET.search(content_type)
    meta = _CHARSET.search(html[:_CHARSET_WITHIN_BYTES])
    name = header[1] if header else meta[1].decode() if meta else "utf-8"
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        codec = "utf-8"
    if not (codec in _WEB_ENCODINGS or codec.startswith(("iso8859-", "cp125"))) or (not header and codec.startswith("utf-16")):
        codec = "utf-8"  # Python knows text encodings that are none (rot13, zip); a meta that can be read is not UTF-16
    codec = "cp1252" if codec in ("iso8859-1", "ascii") else codec  # as browsers do
    return html.removeprefix(b"\xef\xbb\xbf") if codec == "utf-8" else html.decode(codec, "replace").encode("utf-8", "replace")
