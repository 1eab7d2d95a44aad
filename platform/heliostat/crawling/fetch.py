"""EDGE to the web: one request to one address that was checked, within caps. The only file that speaks HTTP.

A forbidden address is refused at three places: a URL before (urls.py), a name when it is resolved (once; the addresses that
were judged are the ones that are connected to), and every socket at the moment it is made, whatever led there. No proxy, no
cookie, no credential, no redirect is followed here.
"""

import asyncio
import errno
import socket
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from heliostat.crawling.addresses import AddressGuard
from heliostat.crawling.config import CrawlConfig

Headers = tuple[tuple[str, str], ...]
Lookup = Callable[[str, int], list[str]]
Judge = Callable[[int, Headers], bool]

_NAME_CACHE_SECONDS = 300
_READ_BYTES = 2**16
_MAX_NAME_THREADS = 64


class FetchFailed(Exception):  # noqa: N818  an outcome that callers count
    """No answer. reason: one of reasons.REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class _ForbiddenAddressError(OSError):
    """A name leads to, or a socket is meant for, an address that may not be connected to."""


@dataclass(frozen=True)
class Answer:
    """What came back. body: empty when the judge did not want it; address: who gave it."""

    status: int
    headers: Headers
    body: bytes
    address: str

    def header(self, name: str) -> str:
        """The first value of a header, "" without one. name: lower case."""
        return next((value for key, value in self.headers if key.lower() == name), "")


@dataclass(frozen=True)
class Wanted:
    """What is asked for. judge: whether to read the body, by status and headers; is_cut: a larger body is cut at the limit."""

    accept: str
    max_bytes: int
    judge: Judge
    is_cut: bool = False
    is_gzip_welcome: bool = False


def look_up(host: str, port: int) -> list[str]:
    """All addresses of a name, by the system's resolver. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Client:
    """An asynchronous context: sends requests while it is open."""

    def __init__(self, config: CrawlConfig, guard: AddressGuard, lookup: Lookup = look_up) -> None:
        self._config, self._guard, self._lookup = config, guard, lookup
        self._session: aiohttp.ClientSession | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._turns = asyncio.Semaphore(config.connections)
        self.num_refused_sockets = 0

    async def __aenter__(self) -> Self:
        limits = self._config.limits
        self._threads = ThreadPoolExecutor(min(_MAX_NAME_THREADS, self._config.connections), "heliostat-names")
        connector = aiohttp.TCPConnector(
            resolver=_GuardedResolver(self._guard, self._lookup, self._threads),
            ttl_dns_cache=_NAME_CACHE_SECONDS,
            limit=0,  # the semaphore counts: waiting for a turn is not part of a request's time
            happy_eyeballs_delay=None,
            socket_factory=self._make_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers={"User-Agent": self._config.agent_header},
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=3 * limits.connect_seconds,
                sock_connect=limits.connect_seconds,
                sock_read=limits.idle_seconds,
            ),
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            response_class=_Response,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        if self._threads is not None:  # a resolver that hangs must not hold up the end of a task
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _make_socket(self, info: Any) -> socket.socket:
        """The last gate, right before connect."""
        family, kind, protocol, _, address = info
        refusal = self._guard.refusal(str(address[0]))
        if refusal:
            self.num_refused_sockets += 1
            raise _ForbiddenAddressError(errno.EACCES, refusal)
        return socket.socket(family, kind, protocol)

    async def get(self, url: str, wanted: Wanted) -> Answer:
        """One GET. url: as urls.py spelled it. Raises FetchFailed."""
        assert self._session is not None, "used outside of its context"  # noqa: S101
        async with self._turns:
            try:
                async with asyncio.timeout(self._config.limits.request_seconds):
                    return await self._get(self._session, url, wanted)
            except FetchFailed:
                raise
            except TimeoutError as error:
                raise FetchFailed("timeout") from error
            except Exception as error:
                raise FetchFailed(_reason(error), " ".join(str(error).split())[:200]) from error

    async def _get(self, session: aiohttp.ClientSession, url: str, wanted: Wanted) -> Answer:
        encoding = "gzip" if wanted.is_gzip_welcome else "identity"
        headers = {"Accept": wanted.accept, "Accept-Encoding": encoding}
        async with session.get(URL(url, encoded=True), headers=headers, allow_redirects=False) as response:
            found = tuple((name, value) for name, value in response.headers.items())
            address = response.address if isinstance(response, _Response) else ""
            if not wanted.judge(response.status, found):
                response.close()  # the body is not wanted: the connection goes, rather than its bytes being read
                return Answer(response.status, found, b"", address)
            body = await _read(response, wanted)
            return Answer(response.status, found, body, address)


class _Response(aiohttp.ClientResponse):
    """A response that knows who gave it."""

    address = ""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """Note the peer before the connection may go back to the pool."""
        peer = connection.transport.get_extra_info("peername") if connection.transport is not None else None
        self.address = str(peer[0]) if peer else ""
        return await super().start(connection)


class _GuardedResolver(AbstractResolver):
    """Asks once, and hands out only addresses that may be connected to."""

    def __init__(self, guard: AddressGuard, lookup: Lookup, threads: ThreadPoolExecutor) -> None:
        self._guard, self._lookup, self._threads = guard, lookup, threads

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Checked addresses. Raises OSError without any."""
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._lookup, host, port)
        checked = [address for address in found if not self._guard.refusal(address)]
        if not found:
            raise OSError(errno.ENOENT, f"{host} has no address")
        if not checked:
            raise _ForbiddenAddressError(errno.EACCES, f"{host} leads to {found[0]}: {self._guard.refusal(found[0])}")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in checked
        ]

    async def close(self) -> None:
        """Nothing is held."""


async def _read(response: aiohttp.ClientResponse, wanted: Wanted) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    unpack = None
    if encoding in ("gzip", "x-gzip") and wanted.is_gzip_welcome:
        unpack = zlib.decompressobj(31)
    elif encoding not in ("", "identity"):
        response.close()
        raise FetchFailed("bad_encoding", encoding[:60])
    announced = response.content_length
    if announced is not None and announced > wanted.max_bytes and not wanted.is_cut:
        response.close()
        raise FetchFailed("too_large", f"{announced} bytes announced")
    body = bytearray()
    async for piece in response.content.iter_chunked(_READ_BYTES):
        body += piece if unpack is None else _unpacked(unpack, piece, wanted.max_bytes + 1 - len(body))
        if len(body) > wanted.max_bytes:
            response.close()
            if not wanted.is_cut:
                raise FetchFailed("too_large")
            return bytes(body[: wanted.max_bytes])
    if unpack is not None and not unpack.eof and body:
        raise FetchFailed("truncated", "the gzip stream ends too early")
    return bytes(body)


def _unpacked(unpack: Any, piece: bytes, limit: int) -> bytes:
    """At most `limit` bytes of what a piece holds: a bomb is never unpacked, and more than `limit` ends the reading."""
    try:
        return bytes(unpack.decompress(piece, max(1, limit)))
    except zlib.error as error:
        raise FetchFailed("bad_encoding", str(error)) from error


def _reason(error: Exception) -> str:
    """Which of reasons.REASONS an exception of aiohttp is."""
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, _ForbiddenAddressError):
        return "forbidden_address"
    for kind, reason in _REASON_OF:
        if isinstance(error, kind):
            return reason
    return "bad_response"


_REASON_OF: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientConnectorCertificateError, "tls"),
    (aiohttp.ClientSSLError, "tls"),
    (aiohttp.ClientConnectorDNSError, "dns"),
    (aiohttp.ClientConnectorError, "connect"),
    (aiohttp.ServerDisconnectedError, "reset"),
    (aiohttp.ClientOSError, "reset"),
    (aiohttp.ClientPayloadError, "truncated"),
    (aiohttp.InvalidURL, "bad_url"),
    (aiohttp.ClientError, "bad_response"),
    (OSError, "reset"),
)
