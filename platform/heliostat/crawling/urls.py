"""URLs as strangers write them -> one plain spelling, or the reason of a refusal.

What browsers would read into a strange spelling (numbers as hosts, backslashes, percent signs in names) is refused, not
guessed: the URL that is checked here is letter by letter the one that is asked for. Where a name leads is judged when it is
resolved.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import idna

from heliostat.crawling.addresses import AddressGuard, address_guard
from heliostat.crawling.config import UrlFilterConfig
from heliostat.errors import DataError
from heliostat.storage import open_store

_PORTS = {"http": 80, "https": 443}
_STRIPPED = "".join(map(chr, range(0x21)))  # WHATWG: C0 controls and blanks around a URL, tabs and newlines inside it
_INSIDE = str.maketrans("", "", "\t\n\r")
_AUTHORITY_V6 = re.compile(r"\[([0-9A-Fa-f:.]{2,45})\](?::([0-9]{0,5}))?")
_AUTHORITY = re.compile(r"([^:\[\]]+)(?::([0-9]{0,5}))?")
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_SAFE = "/%:=&~+!$,;'@()*[]-._"
_SPECIAL_NAMES = frozenset(
    ("localhost", "localdomain", "local", "internal", "intranet", "private", "corp", "home", "lan", "arpa", "onion")
) | {"test", "invalid", "svc", "cluster"}
"""Last labels of names that no public resolver knows (RFC 6761, RFC 9476, ICANN's collisions, Kubernetes)."""
_MAX_LIST_BYTES = 2**30
_FILE_SUFFIXES = (".txt", ".csv", ".tsv", ".list", ".gz", ".json", ".parquet")


class Checked(NamedTuple):
    """url: the plain spelling, or what was given when it is refused; host: lower case; reason: "" or why it is refused."""

    url: str
    host: str
    reason: str


class _Refused(Exception):  # noqa: N818  an outcome
    """The argument is one of reasons.REASONS."""


@dataclass(frozen=True)
class UrlFilter:
    """Checks URLs. restricted: domains, refused with everything below them."""

    config: UrlFilterConfig
    guard: AddressGuard
    restricted: frozenset[str] = frozenset()

    def check(self, text: str, base: str = "", *, is_page: bool = False) -> Checked:
        """Judge one URL, relative to `base` if there is one. Pages may have any suffix."""
        limit = self.config.max_url_characters
        shown = text[: limit + 1]
        try:
            parts = self._parts(text, base)
            shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()[: limit + 1]  # a password is kept nowhere
            host, port = self._authority(parts)
            url = _spelled(parts, host, port, self._path(parts, is_page=is_page))
            return Checked(url, host, "") if len(url) <= limit else Checked(url[:limit], host, "too_long")
        except _Refused as refused:
            return Checked(_shown(shown), "", str(refused))

    def _parts(self, text: str, base: str) -> SplitResult:
        if len(text) <= self.config.max_url_characters:
            return _split(text, base)
        scheme = text[:16].strip(_STRIPPED).partition(":")[0].lower()
        raise _Refused("scheme" if scheme in ("data", "javascript", "blob") else "too_long")

    def _path(self, parts: SplitResult, *, is_page: bool) -> str:
        path = _plain_path(parts)
        _, dot, suffix = path.rpartition("/")[2].rpartition(".")
        if not is_page and dot and suffix.lower() in self.config.blocked_suffixes:
            raise _Refused("blocked_suffix")
        return path

    def _authority(self, parts: SplitResult) -> tuple[str, int]:
        if parts.scheme in _PORTS and "@" in parts.netloc:
            raise _Refused("userinfo")
        host, port = _host_and_port(parts)
        self._check_host(host)
        if port not in self.config.ports:
            raise _Refused("port")
        return host, port

    def _check_host(self, host: str) -> None:
        labels = host.split(".")
        if host.startswith("[") or _NUMBER.fullmatch(labels[-1]):
            refusal = self.guard.refusal(host.strip("[]"))
            if refusal:
                raise _Refused("bad_host" if refusal == "not an address" else "forbidden_address")
        elif (len(labels) == 1 or labels[-1] in _SPECIAL_NAMES) and not self.guard.networks:
            raise _Refused("forbidden_host")  # with allowed_addresses the names of an intranet are asked for, addresses decide
        if any(".".join(labels[start:]) in self.restricted for start in range(len(labels))):
            raise _Refused("restricted_domain")


def plain_url(text: str) -> str:
    """The spelling of an http or https URL for a crawl that may ask for anything; what is no such URL stays as it is."""
    try:
        parts = _split(text, "")
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])  # a password is kept nowhere
        return _spelled(parts, *_host_and_port(parts), _plain_path(parts))
    except _Refused:
        return text


def plain_host(text: str) -> str:
    """A host name or an address as URLs of a crawl spell it. Raises DataError when it is neither."""
    try:
        return _literal_v6(text[1:-1]) if text[:1] == "[" and text[-1:] == "]" else _name(text)
    except _Refused as refused:
        raise DataError(f"{text[:200]!r} is not a host; write example.org") from refused


def url_filter(config: UrlFilterConfig) -> UrlFilter:
    """A filter with its lists read. DataError for a list that cannot be read."""
    domains: set[str] = set()
    for entry in config.restricted_domains:
        domains.update(_read_domains(entry) if "/" in entry else [entry])
    plain = frozenset(domain for domain in (_domain(domain) for domain in domains) if domain)
    return UrlFilter(config, address_guard(config.allowed_addresses), plain)


def _read_domains(uri: str) -> list[str]:
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or "/")
    size = store.size(name)
    if size is None or size > _MAX_LIST_BYTES:
        raise DataError(f"the list of domains {uri} is missing or above {_MAX_LIST_BYTES} bytes; give one domain a line")
    try:
        text = store.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the list of domains {uri} is not UTF-8 at byte {error.start}") from error
    return [line.partition("#")[0].strip() for line in text.split("\n")]


def _domain(text: str) -> str:
    if text.lower().endswith(_FILE_SUFFIXES):
        raise DataError(f"{text[:200]!r} in crawl.filter.restricted_domains looks like a file; write ./{text[:200]}")
    try:
        return _name(text.strip().strip(".").removeprefix("*.")) if text.strip(" .") else ""
    except _Refused as refused:
        raise DataError(f"{text[:200]!r} in crawl.filter.restricted_domains is not a domain; write example.org") from refused


def _split(text: str, base: str) -> SplitResult:
    plain = text.strip(_STRIPPED).translate(_INSIDE)
    if "\\" in plain.partition("?")[0].partition("#")[0]:
        raise _Refused("bad_url")
    try:
        return urlsplit(urljoin(base, plain))
    except ValueError as error:
        raise _Refused("bad_url") from error


def _host_and_port(parts: SplitResult) -> tuple[str, int]:
    if parts.scheme not in _PORTS:
        raise _Refused("scheme" if parts.scheme else "bad_url")
    match = _AUTHORITY_V6.fullmatch(parts.netloc) or _AUTHORITY.fullmatch(parts.netloc)
    if match is None:
        raise _Refused("bad_host" if parts.netloc else "bad_url")
    host = _literal_v6(match[1]) if parts.netloc.startswith("[") else _name(match[1])
    return host, int(match[2]) if match[2] else _PORTS[parts.scheme]


def _spelled(parts: SplitResult, host: str, port: int, path: str) -> str:
    query = f"?{_quoted(parts.query, also='?')}" if parts.query else ""
    return f"{parts.scheme}://{host}{'' if port == _PORTS[parts.scheme] else f':{port}'}{_quoted(path)}{query}"


def _plain_path(parts: SplitResult) -> str:
    path = parts.path or "/"
    return _without_dots(path) if "/." in path else path


def _literal_v6(text: str) -> str:
    try:
        return f"[{ipaddress.IPv6Address(text).compressed}]"
    except ValueError as error:
        raise _Refused("bad_host") from error


def _name(text: str) -> str:
    """A host name in its ASCII form, lower case, without the dot at its end."""
    name = text.lower()
    if not text.isascii():
        try:
            name = idna.encode(text, uts46=True).decode().lower()
        except (idna.IDNAError, UnicodeError) as error:
            raise _Refused("bad_host") from error
    name = name.removesuffix(".")
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise _Refused("bad_host")
    return name


def _without_dots(path: str) -> str:
    """RFC 3986, 5.2.4: robots.txt rules are about the path that the server sees."""
    kept: list[str] = []
    *folders, last = path.split("/")[1:]
    for segment in folders:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if last == "..":
        del kept[-1:]
    return "/" + "".join(f"{segment}/" for segment in kept) + (last if last not in (".", "..") else "")


def _quoted(text: str, also: str = "") -> str:
    return quote(text, safe=_SAFE + also, errors="replace")


def _shown(text: str) -> str:
    """A refused URL as tables keep it: the head of a data: URL, and never half a character."""
    shown = text[:128] if text[:5].lower() == "data:" else text
    return shown.encode("utf-8", "replace").decode()
