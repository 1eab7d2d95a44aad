"""Who does not want to be learnt from: X-Robots-Tag, robots metas, TDM reservations."""

from collections.abc import Iterable, Sequence

from heliostat.crawling.config import PolitenessConfig

_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives that have a colon of their own, so that what stands before it is no agent's name."""


def header_opt_out(headers: Iterable[tuple[str, str]], config: PolitenessConfig, agent: str) -> str:
    """Which header keeps the image out (`x-robots-tag: noai`), "" for none. headers: names in any case."""
    for name, value in headers:
        lower = name.lower()
        if lower == "x-robots-tag":
            word = _tag_word(value, config.opt_out_words, agent)
            if word:
                return f"x-robots-tag: {word}"
        elif lower == "tdm-reservation" and config.tdm_reservation and value.strip() == "1":
            return "tdm-reservation: 1"
    return ""


def page_opt_out(metas: Iterable[tuple[str, str]], config: PolitenessConfig, agent: str) -> str:
    """Which meta of a page keeps its images out (`meta: noai`), "" for none. metas: `PageLinks.robots`."""
    for name, content in metas:
        if name in ("robots", agent.lower()):
            word = _first_word(content.split(","), config.opt_out_words)
            if word:
                return f"meta: {word}"
        elif name == "tdm-reservation" and config.tdm_reservation and content.strip() == "1":
            return "meta: tdm-reservation"
    return ""


def _first_word(parts: Iterable[str], words: Sequence[str]) -> str:
    given = {part.strip().lower() for part in parts}
    return next((word for word in words if word.lower() in given), "")


def _tag_word(value: str, words: Sequence[str], agent: str) -> str:
    """The first such word that is meant for everybody or for us. `agent: a, b` goes for all that follows it."""
    is_ours, ours = True, []
    for part in value.split(","):
        head, colon, tail = part.partition(":")
        if colon and head.strip().lower() not in _WITH_VALUES:
            is_ours, part = head.strip().lower() in ("*", agent.lower()), tail  # noqa: PLW2901
        if is_ours:
            ours.append(part)
    return _first_word(ours, words)
