"""Why a URL was not fetched or gave no image: every word that the links tables and fetch logs use, and whether to try again."""

from typing import NamedTuple


class Reason(NamedTuple):
    """meaning: one line for people; may_pass: a later request may succeed, so the URL belongs into a retry list."""

    meaning: str
    may_pass: bool


OK = "ok"

REASONS: dict[str, Reason] = {
    # Known before any request.
    "scheme": Reason("neither http nor https", False),
    "port": Reason("a port that is not in crawl.filter.ports", False),
    "userinfo": Reason("a user or password in the URL", False),
    "bad_url": Reason("not a URL", False),
    "bad_host": Reason("a host name or address that is not spelled in its plain form", False),
    "too_long": Reason("longer than crawl.filter.max_url_characters", False),
    "forbidden_host": Reason("a name of this machine, of a local network or of a cloud's metadata", False),
    "forbidden_address": Reason("leads to a private, loopback, link-local, metadata or otherwise special address", False),
    "restricted_domain": Reason("in crawl.filter.restricted_domains", False),
    "restricted_page": Reason("linked from a page of a restricted domain", False),
    "blocked_suffix": Reason("its path ends in one of crawl.filter.blocked_suffixes", False),
    "other_candidate": Reason("another size of the same image was chosen", False),
    "over_page_limit": Reason("its page has more than crawl.filter.max_links_per_page images", False),
    "opt_out": Reason("the page, or the answer, says noai, noimageai, noml or reserves text and data mining", False),
    "forgotten": Reason("somebody asked to forget it, its URL, its domain or its bytes", False),
    # Known after asking.
    "robots": Reason("robots.txt disallows it", False),
    "not_found": Reason("404 or 410", False),
    "refused": Reason("401, 402, 403, 407 or 451", False),
    "http_error": Reason("another status that holds no image", False),
    "redirects": Reason("more redirects than crawl.limits.max_redirects, or one that leads nowhere", False),
    "tls": Reason("its certificate or its TLS cannot be trusted", False),
    "bad_response": Reason("not HTTP, or headers beyond the limits", False),
    "bad_encoding": Reason("a Content-Encoding that was not asked for, or that is broken", False),
    "too_large": Reason("larger than crawl.limits.max_image_bytes", False),
    "not_an_image": Reason("its bytes are no image, whatever its name or Content-Type says", False),
    # May pass.
    "robots_unreachable": Reason("robots.txt could not be read (5xx or no answer), which disallows everything", True),
    "dns": Reason("its name was not resolved", True),
    "connect": Reason("no connection", True),
    "timeout": Reason("too slow: connecting, between two bytes, or in all", True),
    "reset": Reason("the connection broke before the answer", True),
    "truncated": Reason("the answer broke off, or was shorter than announced", True),
    "busy": Reason("429, or 503 with a longer Retry-After than crawl.politeness.longest_wait_seconds", True),
    "server_error": Reason("5xx", True),
    "host_down": Reason("its host failed too often in a row, this URL was not asked for", True),
    "straggler": Reason("not done when the task's deadline came", True),
}


def may_pass(reason: str) -> bool:
    """Whether a failure is worth another try, at once or on another day."""
    return reason in REASONS and REASONS[reason].may_pass
