"""URLs get one plain spelling or a reason."""

from pathlib import Path

import pytest

from heliostat.crawling.config import CrawlConfig, UrlFilterConfig, check_contact
from heliostat.crawling.reasons import REASONS
from heliostat.crawling.urls import plain_host, plain_url, url_filter
from heliostat.errors import DataError, UsageError

PLAIN = url_filter(UrlFilterConfig())


@pytest.mark.parametrize(
    ("text", "base", "expected"),
    [
        ("http://Example.ORG", "", "http://example.org/"),
        ("https://example.org:443/a.jpg#part", "", "https://example.org/a.jpg"),
        ("//cdn.example.org/a.jpg", "https://example.org/x/", "https://cdn.example.org/a.jpg"),
        ("../b c.jpg?q=ü", "https://example.org/x/y/z", "https://example.org/x/b%20c.jpg?q=%C3%BC"),
        ("http://example.org/a/./b/../../../c.jpg", "", "http://example.org/c.jpg"),
        ("http://example.org//evil.org/./a.jpg", "", "http://example.org//evil.org/a.jpg"),
        ("http://bücher.de/ä%20.jpg", "", "http://xn--bcher-kva.de/%C3%A4%20.jpg"),
        (" \n http://exa\nmple.org/a,b,c.jpg\t", "", "http://example.org/a,b,c.jpg"),
        ("http://example.org./a", "", "http://example.org/a"),
        ("http://[2606:4700:0::1111]/a", "", "http://[2606:4700::1111]/a"),
        ("http://8.8.8.8/a", "", "http://8.8.8.8/a"),
        ("http://example.org/\ud800.jpg", "", "http://example.org/?.jpg".replace("?", "%3F")),
    ],
)
def test_a_url_gets_its_plain_spelling(text: str, base: str, expected: str) -> None:
    assert PLAIN.check(text, base)[::2] == (expected, "")
    assert PLAIN.check(expected).url == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTP://Example.ORG", "http://example.org/"),
        ("https://example.org:443/a b.svg?q=ü#part", "https://example.org/a%20b.svg?q=%C3%BC"),
        ("http://me:pw@10.1.2.3:8080/x/../a.jpg", "http://10.1.2.3:8080/a.jpg"),
        ("http://localhost:80/a", "http://localhost/a"),
        ("http://bücher.de/", "http://xn--bcher-kva.de/"),
        ("ftp://example.org/A", "ftp://example.org/A"),
        ("folder/A b.jpg", "folder/A b.jpg"),
        ("http://a..org/", "http://a..org/"),
    ],
)
def test_the_spelling_of_a_crawl_is_known_for_urls_that_it_would_not_ask_for(text: str, expected: str) -> None:
    assert plain_url(text) == expected
    assert plain_url(expected) == expected


def test_a_host_is_spelled_as_in_urls() -> None:
    assert [plain_host(text) for text in ("Bücher.DE.", "127.0.0.5", "[2606:4700:0::1111]", "localhost")] == [
        "xn--bcher-kva.de",
        "127.0.0.5",
        "[2606:4700::1111]",
        "localhost",
    ]
    with pytest.raises(DataError, match="'a b' is not a host"):
        plain_host("a b")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ftp://example.org/a", "scheme"),
        ("data:image/png;base64," + "A" * 10**6, "scheme"),
        ("javascript:void(0)", "scheme"),
        ("a.jpg", "bad_url"),
        ("http://example.org:8080/a", "port"),
        ("http://example.org:99999/a", "port"),
        ("http://me@example.org/a", "userinfo"),
        ("http://exa mple.org/a", "bad_host"),
        ("http://-a.org/", "bad_host"),
        ("http://a..org/", "bad_host"),
        ("http://" + "a" * 64 + ".org/", "bad_host"),
        ("http://example.org/" + "a" * 3000, "too_long"),
        ("http://example.org/" + "ü" * 1000, "too_long"),
        ("http://example.org/a.SVG", "blocked_suffix"),
        ("http://example.org/a.svg?x=.jpg", "blocked_suffix"),
        ("http://printer.local/a.jpg", "forbidden_host"),
        ("http://10.1.2.3/a.jpg", "forbidden_address"),
    ],
)
def test_a_refused_url_has_its_reason(text: str, reason: str) -> None:
    found = PLAIN.check(text)
    assert found.reason == reason
    assert reason in REASONS
    assert len(found.url) <= UrlFilterConfig().max_url_characters + 1


def test_a_restricted_domain_stands_for_everything_below_it(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("# unsafe\nBad.org  # all of it\n\n*.worse.net\nbücher.de\n")
    urls = url_filter(UrlFilterConfig(restricted_domains=("evil.com", f"{tmp_path}/list.txt")))
    for host in ("evil.com", "a.b.evil.com", "bad.org", "www.BAD.org", "x.worse.net", "bücher.de"):
        assert urls.check(f"http://{host}/a.jpg").reason == "restricted_domain", host
    for host in ("notevil.com", "bad.org.uk", "org"[::-1] + ".bad.com"):
        assert urls.check(f"http://{host}/a.jpg").reason == "", host


def test_a_list_of_domains_that_is_missing_or_wrong_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("not a domain\n")
    for entry in (f"{tmp_path}/list.txt", f"{tmp_path}/absent.txt", "list.txt"):
        with pytest.raises(DataError):
            url_filter(UrlFilterConfig(restricted_domains=(entry,)))


@pytest.mark.parametrize("contact", ["", "me", "https://", "javascript:alert(1)", "a b@c.de"])
def test_nothing_starts_without_a_contact(contact: str) -> None:
    with pytest.raises(UsageError, match="contact"):
        check_contact(CrawlConfig(contact=contact))


def test_the_agent_is_honest() -> None:
    config = CrawlConfig(contact="mailto:crawl@example.org")
    check_contact(config)
    assert config.agent_header == "HeliostatBot/1.0 (+mailto:crawl@example.org)"
    for token in ("Mozilla", "Googlebot", "Mozilla/5.0", "a", "my bot", "bot\r\nX: y"):
        with pytest.raises(ValueError, match="product token"):
            CrawlConfig(user_agent=token)
