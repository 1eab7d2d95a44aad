"""Turns at a host: how many at once, how far apart, and when it is left alone."""

import asyncio
import email.utils
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from heliostat.crawling.config import PolitenessConfig

_FAILURES_OF_HOSTS = frozenset({"dns", "connect", "timeout", "reset", "tls", "busy", "server_error"})


class HostClosed(Exception):  # noqa: N818  an outcome
    """The host is left alone for the rest of the task. The argument is "host_down" or "busy"."""


class Host:
    """One host's turns. share: over how many tasks its URLs are spread; each of them takes its part of the rate."""

    def __init__(self, config: PolitenessConfig, share: int = 1) -> None:
        self._config = config
        self._seats = asyncio.Semaphore(max(1, config.connections_per_host // share))
        self._interval_seconds = share / config.requests_per_second
        self._share = share
        self._gate = asyncio.Lock()
        self._next_turn = 0.0
        self._failures = 0
        self._closed = ""

    def slow_down(self, delay_seconds: float) -> None:
        """Respect a Crawl-delay that asks for less than we would take."""
        self._interval_seconds = max(self._interval_seconds, delay_seconds * self._share)

    def pause(self, seconds: float) -> None:
        """Respect a Retry-After; one that is too long closes the host."""
        if seconds > self._config.longest_wait_seconds:
            self._closed = "busy"
        self._next_turn = max(self._next_turn, time.monotonic() + seconds)

    def note(self, reason: str) -> None:
        """Count what became of a request; too many failures in a row close the host."""
        self._failures = self._failures + 1 if reason in _FAILURES_OF_HOSTS else 0
        if self._failures >= self._config.max_host_failures:
            self._closed = self._closed or "host_down"

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn. Raises HostClosed."""
        async with self._seats:
            async with self._gate:  # the gap counts from when a turn begins, not from when it was due
                self._check()
                while (wait := self._next_turn - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                self._next_turn = time.monotonic() + self._interval_seconds
            self._check()
            yield

    def _check(self) -> None:
        if self._closed:
            raise HostClosed(self._closed)


class Hosts:
    """All hosts of a task by name; share: of a name, 1 for one that only a redirect led to."""

    def __init__(self, config: PolitenessConfig, share: Callable[[str], int] = lambda _: 1) -> None:
        self._config, self._share = config, share
        self._hosts: dict[str, Host] = {}

    def of(self, name: str) -> Host:
        """The host of this name, port or no port."""
        if name not in self._hosts:
            self._hosts[name] = Host(self._config, self._share(name))
        return self._hosts[name]


def retry_after_seconds(value: str) -> float:
    """Seconds that a Retry-After header asks for, 0 when there is none or it says nothing; never negative."""
    text = value.strip()[:64]
    if text.isascii() and text.isdigit():
        return float(min(int(text), 10**9))
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
