"""Configuration of the crawl: what goes in, which URLs are refused, how politely and for how long they are asked for.

Defaults are assumptions, not studied, unless a field says otherwise.
"""

import ipaddress
import re

from pydantic import Field, field_validator

from heliostat.config import StrictModel
from heliostat.errors import UsageError

_TOKEN = re.compile(r"[A-Za-z][A-Za-z_-]{2,39}")  # RFC 9309, 2.2.1: a product token is letters, "_" and "-"
_CONTACT = re.compile(r"https?://[^\s()<>\"]+\.[^\s()<>\"]+|(mailto:)?[^\s()<>\"@]+@[^\s()<>\"@]+\.[^\s()<>\"@]+")
_OTHERS = ("mozilla", "chrome", "safari", "firefox", "googlebot", "bingbot", "applebot", "ccbot", "gptbot")


class UrlFilterConfig(StrictModel):
    """Which URLs are refused before anything is asked for."""

    ports: tuple[int, ...] = (80, 443)
    """Ports that may be asked; a URL with another one is refused."""

    restricted_domains: tuple[str, ...] = ()
    """Domains whose images and pages are refused with everything below them, and paths or `s3://` URIs of lists of such
domains, one a line (an entry with a slash is a list)."""

    blocked_suffixes: tuple[str, ...] = ("svg", "ico", "css", "js", "json", "xml", "html", "php", "pdf", "mp4", "webm", "mp3")
    """Endings of a URL's path that are refused, without the dot: nothing that a shard could hold is behind them."""

    max_url_characters: int = Field(default=2048, ge=64, le=65536)
    """A longer URL is refused."""

    max_links_per_page: int = Field(default=10_000, gt=0)
    """Further images of one page are refused."""

    every_candidate: bool = False
    """Fetch every size that a page offers of an image; else the best one that is allowed (srcset before lazy before src)."""

    allowed_addresses: tuple[str, ...] = ()
    """Networks (`10.1.0.0/16`) that may be asked although they are private; for intranets and tests, else leave it empty."""

    @field_validator("allowed_addresses")
    @classmethod
    def _networks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            ipaddress.ip_network(value)
        return values


class PolitenessConfig(StrictModel):
    """How often one host is asked, and whose wishes are respected."""

    requests_per_second: float = Field(default=1.0, gt=0)
    """Requests to one host per second, robots.txt and redirects included; a Crawl-delay that asks for less is respected."""

    connections_per_host: int = Field(default=2, gt=0)
    """Requests to one host at the same time."""

    longest_wait_seconds: float = Field(default=60.0, ge=0)
    """A host that asks for a longer pause (Retry-After) is left alone for the rest of the task."""

    max_host_failures: int = Field(default=10, gt=0)
    """After so many failures in a row a host counts as down for the rest of the task."""

    opt_out_words: tuple[str, ...] = ("noai", "noimageai", "noml")
    """Words of X-Robots-Tag and `<meta name="robots">` that keep an image out. Add `noindex` and `noimageindex` to be stricter:
they speak of search engines, so they are not in the default."""

    tdm_reservation: bool = True
    """Whether `tdm-reservation: 1` (header or meta, the W3C community group's TDMRep) keeps an image out."""


class FetchLimits(StrictModel):
    """Caps on what a server can make us hold, read or wait for."""

    max_image_bytes: int = Field(default=20 * 2**20, gt=0, le=2**28)
    """A larger image is refused, announced or not."""

    max_page_bytes: int = Field(default=10 * 2**20, gt=0)
    """A page is read up to here, after decompression."""

    max_header_bytes: int = Field(default=16_384, ge=1024)
    """A longer header line is refused; 128 lines are the most."""

    max_redirects: int = Field(default=3, ge=0, le=10)
    """Redirects per URL; each target passes every check anew. robots.txt may take 5 (RFC 9309, 2.3.1.2)."""

    connect_seconds: float = Field(default=10.0, gt=0)
    """The longest wait for a name and a connection, each."""

    idle_seconds: float = Field(default=15.0, gt=0)
    """The longest silence between two bytes."""

    request_seconds: float = Field(default=60.0, gt=0)
    """The longest time for one answer in all, however steadily it drips."""

    attempts: int = Field(default=3, gt=0, le=20)
    """Requests for one URL in all, when its failures are of a kind that may pass."""

    first_pause_seconds: float = Field(default=1.0, ge=0)
    """Upper end of the pause after the first failure; it doubles with every further one."""

    task_deadline_seconds: float = Field(default=3600.0, gt=0)
    """When a task has run for so long, what is left are stragglers."""

    straggler_ratio: float = Field(default=0.01, ge=0, le=1)
    """When no more than this share of a task's URLs is left, it has `straggler_seconds` more."""

    straggler_seconds: float = Field(default=120.0, ge=0)
    """How long the last URLs of a task may drag on."""


class CrawlConfig(StrictModel):
    """Pages, WARC files or URL lists -> images with a log of every request."""

    pages: tuple[str, ...] = ()
    """Page URLs, lists of page URLs (.txt .csv .tsv .jsonl .parquet), or folders (`s3://` prefixes) of .html files whose paths
are `host/path` as `wget --mirror` lays them."""

    warcs: tuple[str, ...] = ()
    """WARC files (.warc, .warc.gz), or folders of them."""

    urls: tuple[str, ...] = ()
    """Lists of image URLs (.txt .csv .tsv .jsonl .parquet), or folders of them."""

    contact: str = ""
    """A web page or e-mail address about this crawl, which every request shows. Nothing starts without it."""

    user_agent: str = "HeliostatBot"
    """Product token: what robots.txt files name, and what every request shows before the contact."""

    urls_per_task: int = Field(default=10_000, gt=0)
    """URLs that one task downloads; all URLs of a host are in one task, unless they are more than this."""

    connections: int = Field(default=64, gt=0)
    """Requests of one task at the same time, over all hosts."""

    hosts_at_once: int = Field(default=1024, gt=0)
    """Hosts of one task that take turns; with a polite rate this bounds the speed: hosts_at_once x requests_per_second."""

    filter: UrlFilterConfig = UrlFilterConfig()
    """Which URLs are refused."""

    politeness: PolitenessConfig = PolitenessConfig()
    """How often one host is asked."""

    limits: FetchLimits = FetchLimits()
    """Caps on bytes, time, redirects and attempts."""

    @field_validator("user_agent")
    @classmethod
    def _honest(cls, value: str) -> str:
        if not _TOKEN.fullmatch(value) or value.lower() in _OTHERS:
            raise ValueError(
                f"{value[:60]!r} is not a product token of your own; use 3 to 40 letters, '-' or '_', such as HeliostatBot"
            )
        return value

    @property
    def agent_header(self) -> str:
        """The User-Agent of every request."""
        return f"{self.user_agent}/1.0 (+{self.contact})"


def check_contact(config: CrawlConfig) -> None:
    """UsageError unless the operators of web sites can see whom to write to."""
    if not _CONTACT.fullmatch(config.contact):
        raise UsageError(
            f"crawl.contact={config.contact[:80]!r} is no web page and no e-mail address; "
            "set crawl.contact=https://... so that site owners can reach you"
        )
