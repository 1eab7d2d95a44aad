"""robots.txt (RFC 9309): asked for once per host and task, kept for as many hosts as fit."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from protego import Protego

MAX_ROBOTS_BYTES = 500 * 1024  # RFC 9309, 2.5: at least this much is read
MAX_ROBOTS_REDIRECTS = 5  # RFC 9309, 2.3.1.2
_MAX_HOSTS = 4096
_MAX_DELAY_SECONDS = 3600.0


@dataclass(frozen=True)
class RobotsAnswer:
    """What asking for a robots.txt gave. status: of the last answer, None when there was none; failure: why, when the host
    itself cannot be asked at all (one of reasons.REASONS)."""

    status: int | None
    body: bytes = b""
    failure: str = ""


@dataclass(frozen=True)
class Rules:
    """What a host allows. kind: "rules", "none" (4xx: all is allowed) or "unreachable" (5xx, no answer: nothing is)."""

    kind: str
    parsed: Protego | None = None
    failure: str = "robots_unreachable"
    """What a URL of an unreachable kind is called: hosts that do not exist have no robots.txt to speak of."""

    def verdict(self, url: str, agent: str) -> str:
        """allowed, disallowed, none or unreachable."""
        if self.parsed is None:
            return self.kind
        return "allowed" if self.parsed.can_fetch(url, agent) else "disallowed"

    def delay_seconds(self, agent: str) -> float:
        """The Crawl-delay for this agent, 0 without one; at most an hour."""
        delay = self.parsed.crawl_delay(agent) if self.parsed is not None else None
        return min(float(delay or 0.0), _MAX_DELAY_SECONDS)


def read_rules(answer: RobotsAnswer) -> Rules:
    """RFC 9309, 2.3.1: 2xx is parsed, 4xx allows everything, all else disallows everything."""
    status = answer.status
    if status is not None and 200 <= status < 300:
        text = answer.body[:MAX_ROBOTS_BYTES].decode("utf-8-sig", "replace")
        return Rules("rules", Protego.parse(text))
    if status is not None and 400 <= status < 500 and status != 429:  # 429 is "not now", not "there is none"
        return Rules("none")
    return Rules("unreachable", failure=answer.failure or "robots_unreachable")


class RobotsCache:
    """Rules by origin. fetch: asks for one robots.txt, redirects included, and never raises."""

    def __init__(self, fetch: Callable[[str], Awaitable[RobotsAnswer]]) -> None:
        self._fetch = fetch
        self._known: OrderedDict[str, asyncio.Task[Rules]] = OrderedDict()

    async def rules(self, url: str) -> Rules:
        """The rules for a URL; those who ask at the same time share one request."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        task = self._known.get(origin)
        if task is None:
            task = self._known[origin] = asyncio.ensure_future(self._ask(origin))
        self._known.move_to_end(origin)
        while len(self._known) > _MAX_HOSTS and next(iter(self._known.values())).done():
            self._known.popitem(last=False)
        return await asyncio.shield(task)

    def forget(self, url: str) -> None:
        """Ask again next time; for hosts whose robots.txt was not reachable."""
        parts = urlsplit(url)
        task = self._known.get(f"{parts.scheme}://{parts.netloc}")
        if task is not None and task.done():
            del self._known[f"{parts.scheme}://{parts.netloc}"]

    async def close(self) -> None:
        """End what is still being asked for."""
        waiting = [task for task in self._known.values() if not task.done()]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _ask(self, origin: str) -> Rules:
        return read_rules(await self._fetch(f"{origin}/robots.txt"))
