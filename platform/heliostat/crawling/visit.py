"""One URL, from robots.txt over redirects and retries to its bytes, or to the reason why there are none."""

import asyncio
import random
from dataclasses import dataclass, field
from urllib.parse import urljoin

from heliostat.crawling.config import CrawlConfig
from heliostat.crawling.fetch import Answer, Client, FetchFailed, Headers, Wanted
from heliostat.crawling.opt_out import header_opt_out
from heliostat.crawling.politeness import HostClosed, Hosts, retry_after_seconds
from heliostat.crawling.reasons import OK, may_pass
from heliostat.crawling.robots import MAX_ROBOTS_BYTES, MAX_ROBOTS_REDIRECTS, RobotsAnswer, RobotsCache
from heliostat.crawling.urls import UrlFilter
from heliostat.retries import Budget

_REDIRECTS = (301, 302, 303, 307, 308)
_IMAGE_TYPES = "image/jpeg,image/png,image/webp,image/gif,image/tiff,image/bmp,*/*;q=0.1"  # what a shard can hold
_PAGE_TYPES = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.1"
_FAILURES_OF_HOSTS = ("dns", "connect", "forbidden_address", "tls")
_MAX_HEADER_CHARACTERS = 512
_generator = random.SystemRandom()  # pauses only; nothing that is written depends on them


@dataclass
class Visited:
    """What became of a URL. status: "ok" or one of reasons.REASONS; body: empty unless ok; the rest is evidence for the log."""

    status: str
    body: bytes = b""
    http_status: int | None = None
    attempts: int = 0
    final_url: str = ""
    address: str = ""
    robots: str = ""
    opt_out: str = ""
    headers: Headers = field(default=(), repr=False)
    is_closed: bool = False
    """Whether the host is left alone for the rest of the task, so that asking again at once is no use."""

    def header(self, name: str) -> str | None:
        """A header of the last answer, cut to a length that a table can hold; None without one."""
        found = next((value for key, value in self.headers if key.lower() == name), None)
        return None if found is None else found[:_MAX_HEADER_CHARACTERS]


class Visitor:
    """Visits URLs through a client; one for all URLs of a task, so that hosts and robots.txt files are shared."""

    def __init__(self, config: CrawlConfig, urls: UrlFilter, client: Client, hosts: Hosts) -> None:
        self._config, self._urls, self._client, self._hosts = config, urls, client, hosts
        self._robots = RobotsCache(self._fetch_robots)

    async def close(self) -> None:
        """End requests that nobody waits for."""
        await self._robots.close()

    async def image(self, url: str) -> Visited:
        """Fetch an image; whether its bytes are one is for others to judge."""
        return await self._visit(url, is_page=False)

    async def page(self, url: str) -> Visited:
        """Fetch a page, cut at the limit."""
        return await self._visit(url, is_page=True)

    async def _visit(self, url: str, *, is_page: bool) -> Visited:
        limits = self._config.limits
        budget = Budget(limits.attempts, float("inf"), limits.first_pause_seconds)
        for attempt in range(1, limits.attempts + 1):
            visited = await self._follow(url, is_page=is_page)
            visited.attempts = attempt
            if not may_pass(visited.status) or visited.is_closed or attempt == limits.attempts:
                return visited
            if visited.robots == "unreachable":
                self._robots.forget(url)
            await asyncio.sleep(_generator.uniform(0.0, budget.pause_limit(attempt)))
        raise AssertionError("unreachable: the last attempt returns")

    async def _follow(self, url: str, *, is_page: bool) -> Visited:
        """One attempt: the URL and where it redirects to, each checked, robots.txt asked, and in turn."""
        visited = Visited("redirects")
        for _ in range(self._config.limits.max_redirects + 1):
            checked = self._urls.check(url, visited.final_url, is_page=is_page)
            if checked.reason:
                visited.status, visited.final_url = checked.reason, checked.url
                return visited
            visited.final_url = checked.url
            try:
                answer = await self._ask(checked.url, checked.host, visited, is_page=is_page)
            except FetchFailed as failure:
                visited.status = failure.reason
                return visited
            except HostClosed as closed:
                visited.status, visited.is_closed = str(closed), True
                return visited
            if answer is None:
                return visited
            visited.http_status, visited.address, visited.headers = answer.status, answer.address, answer.headers
            if answer.status not in _REDIRECTS or not answer.header("location"):
                visited.status = "opt_out" if visited.opt_out and not is_page else _status_of(answer.status)
                visited.body = answer.body if visited.status == OK else b""
                return visited
            url = answer.header("location")
        visited.status = "redirects"
        return visited

    async def _ask(self, url: str, name: str, visited: Visited, *, is_page: bool) -> Answer | None:
        """One request in turn; None when robots.txt is against it (`visited` says so). Raises HostClosed, FetchFailed."""
        config, host = self._config, self._hosts.of(name)
        rules = await self._robots.rules(url)
        visited.robots = rules.verdict(url, config.user_agent)
        if visited.robots in ("disallowed", "unreachable"):
            visited.status = "robots" if visited.robots == "disallowed" else rules.failure
            return None
        host.slow_down(rules.delay_seconds(config.user_agent))

        def judge(status: int, headers: Headers) -> bool:
            if status == 200:
                visited.opt_out = header_opt_out(headers, config.politeness, config.user_agent)
            return status == 200 and (is_page or not visited.opt_out)

        wanted = Wanted(_IMAGE_TYPES, config.limits.max_image_bytes, judge)
        if is_page:
            wanted = Wanted(_PAGE_TYPES, config.limits.max_page_bytes, judge, is_cut=True, is_gzip_welcome=True)
        return await self._in_turn(url, name, wanted)

    async def _in_turn(self, url: str, name: str, wanted: Wanted) -> Answer:
        host = self._hosts.of(name)
        async with host.turn():
            try:
                answer = await self._client.get(url, wanted)
            except FetchFailed as failure:
                host.note(failure.reason)
                raise
            host.note(_status_of(answer.status))
            if answer.status in (429, 503):
                host.pause(retry_after_seconds(answer.header("retry-after")))
            return answer

    async def _fetch_robots(self, url: str) -> RobotsAnswer:
        wanted = Wanted(
            "text/plain,*/*;q=0.5", MAX_ROBOTS_BYTES, lambda status, _: status < 300, is_cut=True, is_gzip_welcome=True
        )
        first = url
        try:
            for _ in range(MAX_ROBOTS_REDIRECTS + 1):
                checked = self._urls.check(url, is_page=True)
                if checked.reason:
                    return RobotsAnswer(None)
                answer = await self._in_turn(checked.url, checked.host, wanted)
                if answer.status not in _REDIRECTS or not answer.header("location"):
                    return RobotsAnswer(answer.status, answer.body)
                url = urljoin(checked.url, answer.header("location"))
        except FetchFailed as failure:
            is_host = url == first and failure.reason in _FAILURES_OF_HOSTS
            return RobotsAnswer(None, failure=failure.reason if is_host else "")
        except (HostClosed, ValueError):
            return RobotsAnswer(None)
        return RobotsAnswer(404)  # RFC 9309, 2.3.1.2: after five redirects it may count as unavailable


def _status_of(status: int) -> str:
    """The word for an HTTP status."""
    words = {200: OK, 404: "not_found", 410: "not_found", 429: "busy"}
    words |= dict.fromkeys((401, 402, 403, 407, 451), "refused")
    return words.get(status, "server_error" if status >= 500 else "http_error")
