"""No request ever goes to an address that is not public: at the URL, at the resolver, at the socket, at every redirect."""

import asyncio
import ipaddress
import random
import socket
import sys
from collections.abc import Iterator

import pytest
from forbidden_urls import ADDRESSES, IPV6, forbidden_hosts, forbidden_urls
from local_web import NETWORK, LocalWeb, crawl_config, local_web, site

from heliostat.crawling.addresses import address_guard
from heliostat.crawling.fetch import Client, FetchFailed, Wanted
from heliostat.crawling.politeness import Hosts
from heliostat.crawling.reasons import REASONS
from heliostat.crawling.urls import url_filter
from heliostat.crawling.visit import Visited, Visitor

_connects: list[str] = []
_refused_sockets: list[int] = []
"""How many sockets the last gate refused, for each client that was used past the filter."""


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.connect":
        _connects.append(str(arguments[1]))


sys.addaudithook(_note)


@pytest.fixture
def connects() -> list[str]:
    """Targets of every connect of this process since the test began, as the interpreter reports them."""
    _connects.clear()
    return _connects


@pytest.fixture(scope="module")
def web() -> Iterator[LocalWeb]:
    with local_web(3) as running:
        yield running


ANYTHING = Wanted("*/*", 1000, lambda *_: True)


def visit(web: LocalWeb, urls: list[str], **changes: object) -> list[Visited]:
    async def run() -> list[Visited]:
        config = crawl_config(web, **changes)
        checks = url_filter(config.filter)
        async with Client(config, checks.guard, web.lookup) as client:
            visitor = Visitor(config, checks, client, Hosts(config.politeness))
            found = [await visitor.image(url) for url in urls]
            await visitor.close()
            return found

    return asyncio.run(run())


def get_past_the_filter(urls: list[str], lookup: object, allowed: tuple[str, ...] = ()) -> list[str]:
    """What the client alone says, as if the filter had a hole."""

    async def run() -> list[str]:
        config, reasons = crawl_config(limits={"attempts": 1}), []
        async with Client(config, address_guard(allowed), lookup) as client:  # type: ignore[arg-type]
            for url in urls:
                try:
                    await client.get(url, ANYTHING)
                    reasons.append("ok")
                except FetchFailed as failure:
                    reasons.append(failure.reason)
            _refused_sockets.append(client.num_refused_sockets)
        return reasons

    return asyncio.run(run())


def test_more_than_300_forbidden_spellings_are_refused_and_none_is_connected_to(web: LocalWeb, connects: list[str]) -> None:
    urls = forbidden_urls()
    assert len(urls) >= 300
    for found, url in zip(visit(web, urls, filter={"allowed_addresses": ()}), urls, strict=True):
        assert found.status in REASONS, url
        assert found.http_status is None, url
    assert connects == []


def test_an_allowed_network_opens_nothing_but_itself(web: LocalWeb, connects: list[str]) -> None:
    statuses = {found.status for found in visit(web, forbidden_urls())}
    assert "ok" not in statuses
    assert connects == []
    assert visit(web, [web.url(0, "/img/1.png")])[0].status == "ok"
    assert {target.split("'")[1] for target in connects} == {web.hosts[site(0)]}


def test_the_client_alone_connects_to_none_of_the_spellings(connects: list[str]) -> None:
    """The filter is left out: the resolver is the system's habit of reading numbers as addresses."""

    def system(host: str, port: int) -> list[str]:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [str(entry[4][0]) for entry in found]

    urls = [f"http://{host}/a.png" for host in forbidden_hosts() if host.isascii() and "%" not in host]
    assert len(urls) > 300
    assert "ok" not in get_past_the_filter(urls, system)
    assert _refused_sockets[-1] > 0, "addresses as such pass by the resolver"
    assert connects == []


def test_a_name_that_leads_to_a_forbidden_address_is_refused(connects: list[str]) -> None:
    _refused_sockets.clear()
    for address in (*ADDRESSES, *IPV6, "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe", "fe80::1%1"):
        assert get_past_the_filter(["http://innocent.example.org/"], lambda *_, a=address: [a]) == ["forbidden_address"], (
            address
        )
    assert set(_refused_sockets) == {0}, "the resolver was there first"
    assert connects == []


def test_of_several_answers_only_the_checked_ones_are_connected_to(web: LocalWeb, connects: list[str]) -> None:
    answers = ["127.0.0.1", "169.254.169.254", web.hosts[site(0)]]
    assert get_past_the_filter([f"http://many.example.org:{web.port}/img/1.png"], lambda *_: answers, (NETWORK,)) == ["ok"]
    assert [target.split("'")[1] for target in connects] == [web.hosts[site(0)]]


def test_a_name_that_changes_its_answer_is_never_connected_to_where_it_was_not_checked(
    web: LocalWeb, connects: list[str]
) -> None:
    """DNS rebinding: good when it is asked for the first time, loopback ever after."""
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return [web.hosts[site(0)]] if len(asked) == 1 else ["127.0.0.1"]

    urls = [f"http://rebind.example.org:{web.port}/status/404"] * 3 + [f"http://rebind.example.org:{web.port}/reset"] * 2
    get_past_the_filter(urls, rebinding, (NETWORK,))
    assert {target.split("'")[1] for target in connects} == {web.hosts[site(0)]}

    asked.clear()
    connects.clear()
    other_ports = [f"http://rebind.example.org:{port}/" for port in (web.port, 8081, 8082)]  # asked for anew for each port
    assert get_past_the_filter(other_ports, rebinding, (NETWORK,)) == ["ok", "forbidden_address", "forbidden_address"]
    assert {target.split("'")[1] for target in connects} == {web.hosts[site(0)]}


def test_a_redirect_to_any_forbidden_spelling_is_not_followed(web: LocalWeb, connects: list[str]) -> None:
    targets = [f"http://{host}/a.png" for host in forbidden_hosts() if host.isascii()]
    targets += [
        f"http://127.0.0.1:{web.port}/img/1.png",
        f"http://localhost:{web.port}/img/1.png",
        "file:///etc/passwd",
        "//127.0.0.1/",
    ]
    found = visit(web, [web.url(1, f"/to/{target}") for target in targets], limits={"attempts": 1})
    assert {entry.http_status for entry in found} == {302}
    assert "ok" not in {entry.status for entry in found}
    assert {target.split("'")[1] for target in connects} == {web.hosts[site(1)]}


def test_a_robots_txt_that_redirects_to_a_forbidden_address_disallows_and_is_not_followed(
    web: LocalWeb, connects: list[str]
) -> None:
    web.robots[site(2)] = (301, "Location: http://169.254.169.254/latest/meta-data/\r\n", b"")
    assert visit(web, [web.url(2, "/img/1.png")])[0].status == "robots_unreachable"
    assert {target.split("'")[1] for target in connects} == {web.hosts[site(2)]}


def test_public_addresses_pass_and_everything_that_is_not_global_by_an_independent_list_does_not() -> None:
    guard = address_guard(())
    for address in ("8.8.8.8", "1.1.1.1", "193.0.6.139", "2606:4700:4700::1111", "2a00:1450:4001:81b::2004"):
        assert guard.refusal(address) == "", address
    generator = random.Random(5)
    for _ in range(20_000):
        bits = generator.choice((32, 128))
        value = generator.getrandbits(bits)
        address = ipaddress.IPv4Address(value) if bits == 32 else ipaddress.IPv6Address(value)
        if not address.is_global or address.is_multicast:
            assert guard.refusal(str(address)), address


@pytest.mark.parametrize("text", ["0x7f000001", "127.1", "2130706433", "localhost", "", "127.0.0.1:80", "[::1]", "1.2.3.4/8"])
def test_only_the_plain_form_of_an_address_is_one(text: str) -> None:
    assert address_guard(("0.0.0.0/0", "::/0")).refusal(text) == "not an address"
