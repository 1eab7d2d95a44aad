"""HTML of any kind gives image links, and nothing that strangers write breaks it."""

import time

import pytest

from heliostat.crawling.config import CrawlConfig, PolitenessConfig
from heliostat.crawling.extract import links_of_page
from heliostat.crawling.links import page_links, parse_srcset
from heliostat.crawling.opt_out import header_opt_out, page_opt_out
from heliostat.crawling.urls import url_filter
from heliostat.crawling.warc import Page

CONFIG = CrawlConfig()
URLS = url_filter(CONFIG.filter)


def links(html: str | bytes, url: str = "https://example.org/d/page", config: CrawlConfig = CONFIG) -> list[tuple[str, str]]:
    """(url, reason) of every link of a page."""
    data = html.encode() if isinstance(html, str) else html
    return [(row[0], row[5]) for row in links_of_page(Page(url, data, "text/html"), url_filter(config.filter), config)]


def test_src_srcset_lazy_attributes_and_base_are_read() -> None:
    html = """<base href="/files/"><img src=a.jpg alt="A &amp; b"><img data-src="b.jpg" src="blank.gif">
      <img srcset="s.jpg 100w, l.jpg 900w" src=s.jpg><picture><source srcset="p.webp 2x"><img src=p.jpg></picture>
      <noscript><img src=n.jpg></noscript><script>'<img src=no.jpg>'</script><!-- <img src=no.jpg> -->
      <img alt=none><IMG SRC=u.jpg>"""
    chosen = [url.rpartition("/files/")[2] for url, reason in links(html) if not reason]
    assert chosen == ["a.jpg", "b.jpg", "l.jpg", "p.webp", "n.jpg", "u.jpg"]
    others = [url.rpartition("/")[2] for url, reason in links(html) if reason == "other_candidate"]
    assert others == ["blank.gif", "s.jpg", "p.jpg"]
    assert page_links(html.encode()).images[0].alt == "A & b"


def test_the_best_candidate_is_one_that_is_allowed_and_all_can_be_asked_for() -> None:
    html = '<img srcset="l.svg 900w, m.jpg 500w" src="data:image/gif;base64,R0">'
    base = "https://example.org/d/"
    assert links(html) == [(base + "l.svg", "blocked_suffix"), (base + "m.jpg", ""), ("data:image/gif;base64,R0", "scheme")]
    every = CrawlConfig(filter={"every_candidate": True})
    assert [reason for _, reason in links('<img srcset="l.jpg 2x, m.jpg" src=m.jpg>', config=every)] == ["", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg", [("a.jpg", 1.0)]),
        ("a,b.jpg 1x, c.jpg 2x", [("a,b.jpg", 1.0), ("c.jpg", 2.0)]),
        ("w_100,h_50/a.jpg 100w,w_200,h_90/a.jpg 200w", [("w_100,h_50/a.jpg", 100.0), ("w_200,h_90/a.jpg", 200.0)]),
        ("a.jpg, b.jpg", [("a.jpg", 1.0), ("b.jpg", 1.0)]),
        (",, a.jpg 2x,,", [("a.jpg", 2.0)]),
        ("a.jpg (x, y) 3x, b.jpg", [("a.jpg", 3.0), ("b.jpg", 1.0)]),
        ("data:image/png;base64,AA== 1x", [("data:image/png;base64,AA==", 1.0)]),
        ("a.jpg 1e99999w", [("a.jpg", 1.0)]),
        ("", []),
    ],
)
def test_a_srcset_is_read_as_browsers_do(text: str, expected: list[tuple[str, float]]) -> None:
    assert [(candidate.url, candidate.weight[1]) for candidate in parse_srcset(text)] == expected


@pytest.mark.parametrize(
    ("html", "content_type", "expected"),
    [
        ("<img src=a alt=é>".encode(), "", "é"),
        ("<img src=a alt=é>".encode("latin-1"), "text/html; charset=ISO-8859-1", "é"),
        ("<meta charset='shift_jis'><img src=a alt=写真>".encode("shift_jis"), "", "写真"),
        ("<meta http-equiv=x content='text/html; charset=windows-1251'><img src=a alt=Ж>".encode("cp1251"), "", "Ж"),
        ("<img src=a alt=é>".encode("utf-16"), "", "é"),
        ("<meta charset=utf-16><img src=a alt=é>".encode(), "", "é"),
        ("<meta charset=rot13><img src=a alt=é>".encode(), "", "é"),
        ("<meta charset=nonsense><img src=a alt=é>".encode(), 'text/html; charset="idna"', "é"),
        (b"<img src=a alt=\xff\xfe>", "", "\ufffd\ufffd"),
        (b"\xef\xbb\xbf<img src=a alt=x>", "", "x"),
    ],
)
def test_any_encoding_is_read(html: bytes, content_type: str, expected: str) -> None:
    (image,) = page_links(html, content_type).images
    assert image.alt == expected


HOSTILE = {
    "nested": b"<div>" * 500_000 + b"<img src=x.jpg>",
    "tables": b"<table><tr><td>" * 200_000 + b"<img src=x.jpg>",
    "distinct attributes": b"<img " + b"".join(b"a%d=b " % number for number in range(300_000)) + b"src=x.jpg>",
    "unclosed": b"<img src='x.jpg'><" * 100_000,
    "one attribute": b"<img src='" + b"x" * 9_000_000 + b"'>",
    "comments": b"<!--" * 2_000_000,
    "entities": b"&amp;" * 2_000_000,
    "srcset": b"<img srcset='" + b"a 1x, (" * 1_000_000 + b"'>",
    "zeros": bytes(5_000_000),
    "metas": b"<meta name=robots content=x>" * 200_000,
    "doctype": b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><img src=x.jpg alt='&b;'>",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_html_costs_seconds_at_most_and_every_link_is_counted(name: str) -> None:
    started = time.process_time()
    found = page_links(HOSTILE[name])
    assert time.process_time() - started < 5
    assert all(len(candidate.url) <= 2**16 + 1 for image in found.images for candidate in image.candidates)
    if name in ("nested", "tables", "distinct attributes", "doctype"):
        assert [image.candidates[0].url for image in found.images] == ["x.jpg"]
    assert "root:" not in "".join(image.alt for image in found.images)


def test_a_page_beyond_its_limit_is_cut_and_says_so() -> None:
    config = CrawlConfig(filter={"max_links_per_page": 3})
    found = links("".join(f"<img src={number}.jpg>" for number in range(5)), config=config)
    assert [reason for _, reason in found] == ["", "", "", "over_page_limit", "over_page_limit"]


def test_a_page_that_opts_out_takes_its_images_along() -> None:
    html = '<meta name="Robots" content="index, NoImageAI"><img src=a.jpg>'
    assert [reason for _, reason in links(html)] == ["opt_out"]
    assert [reason for _, reason in links('<meta name="robots" content="noindex"><img src=a.jpg>')] == [""]
    assert [reason for _, reason in links('<meta name="tdm-reservation" content="1"><img src=a.jpg>')] == ["opt_out"]
    page = Page("https://example.org/", b"<img src=a.jpg>", "text/html", (("X-Robots-Tag", "noai"),))
    ((*_, opt_out, reason),) = links_of_page(page, URLS, CONFIG)
    assert (opt_out, reason) == ("x-robots-tag: noai", "opt_out")


def test_a_restricted_page_and_its_licence() -> None:
    config = CrawlConfig(filter={"restricted_domains": ("example.org",)})
    assert links("<img src=https://cdn.net/a.jpg>", config=config) == [("https://cdn.net/a.jpg", "restricted_page")]
    page = Page("https://a.org/", b'<a rel="nofollow license" href="//cc.org/by">x</a><img src=a.jpg>', "text/html")
    ((_, _, _, licence, _, _),) = links_of_page(page, URLS, CONFIG)
    assert licence == "https://cc.org/by"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("noai", "noai"),
        ("NOINDEX, NoImageAI", "noimageai"),
        ("noml", "noml"),
        ("HeliostatBot: noai", "noai"),
        ("otherbot: noai", ""),
        ("otherbot: noai, heliostatbot: nofollow, noml", "noml"),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", "noai"),
        ("*: noai", "noai"),
        ("noindex", ""),
        ("noaircraft", ""),
        ("", ""),
    ],
)
def test_an_x_robots_tag_is_read_with_and_without_an_agent(value: str, expected: str) -> None:
    found = header_opt_out([("x-ROBOTS-tag", value)], PolitenessConfig(), "HeliostatBot")
    assert found == (f"x-robots-tag: {expected}" if expected else "")


def test_words_can_be_added_and_other_headers_say_nothing() -> None:
    strict = PolitenessConfig(opt_out_words=("noai", "noindex"))
    assert header_opt_out([("X-Robots-Tag", "noindex")], strict, "B") == "x-robots-tag: noindex"
    assert header_opt_out([("TDM-Reservation", "1")], strict, "B") == "tdm-reservation: 1"
    assert header_opt_out([("TDM-Reservation", "0"), ("X-Other", "noai")], strict, "B") == ""
    assert page_opt_out([("heliostatbot", "noai")], strict, "HeliostatBot") == "meta: noai"
    assert page_opt_out([("otherbot", "noai"), ("description", "noai")], strict, "HeliostatBot") == ""
