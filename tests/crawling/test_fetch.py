"""What one connection may do: certificates are checked, connections are kept, the gate stands at every socket."""

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from local_web import NETWORK, LocalWeb, crawl_config, local_web, site

from heliostat.crawling.addresses import address_guard
from heliostat.crawling.config import CrawlConfig
from heliostat.crawling.fetch import Client, FetchFailed, Lookup, Wanted, look_up

ANYTHING = Wanted("*/*", 2**20, lambda *_: True)


@pytest.fixture(scope="module")
def web() -> Iterator[LocalWeb]:
    with local_web(2) as running:
        yield running


def get(config: CrawlConfig, lookup: Lookup, *urls: str, wanted: Wanted = ANYTHING) -> list[str]:
    """For each URL the status, or the reason why there is no answer."""

    async def run() -> list[str]:
        found = []
        async with Client(config, address_guard((NETWORK,)), lookup) as client:
            for url in urls:
                try:
                    found.append(str((await client.get(url, wanted)).status))
                except FetchFailed as failure:
                    found.append(failure.reason)
        return found

    return asyncio.run(run())


@pytest.fixture
def self_signed(tmp_path: Path) -> Iterator[int]:
    """Port of a TLS server on 127.10.0.1 whose certificate nobody vouches for."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, site(0))])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    certificate = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(site(0))]), False).sign(key, hashes.SHA256())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "both.pem").write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    listener = socket.create_server(("127.10.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                context.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.close()
    thread.join(5)


def test_a_certificate_that_nobody_vouches_for_is_refused(web: LocalWeb, self_signed: int) -> None:
    assert get(crawl_config(web), web.lookup, f"https://{site(0)}:{self_signed}/a.png") == ["tls"]


def test_what_speaks_no_tls_and_what_does_not_listen_have_reasons_of_their_own(web: LocalWeb) -> None:
    with socket.create_server(("127.10.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    urls = (f"https://{site(0)}:{web.port}/a.png", f"http://{site(0)}:{closed}/a.png", "http://absent.example.org/")
    found = get(crawl_config(web), web.lookup, *urls)
    assert found[0] in ("tls", "reset", "timeout")
    assert found[1:] == ["connect", "dns"]


def test_a_resolver_that_hangs_costs_a_timeout_and_not_the_end_of_the_task(web: LocalWeb) -> None:
    release = threading.Event()

    def hanging(host: str, port: int) -> list[str]:
        release.wait(20)
        return [web.hosts[site(0)]]

    config = crawl_config(web, limits={"request_seconds": 0.5})
    try:
        assert get(config, hanging, web.url(0, "/img/1.png")) == ["timeout"]
    finally:
        release.set()


def test_a_resolver_that_answers_nonsense_leads_nowhere(web: LocalWeb) -> None:
    for answer, reason in (
        ([], "dns"),
        (["not an address"], "forbidden_address"),
        (["127.10.0.1; rm", ""], "forbidden_address"),
    ):
        assert get(crawl_config(web), lambda *_, a=answer: a, web.url(0, "/img/1.png")) == [reason]


def test_a_gzip_bomb_is_cut_at_the_limit_and_never_unpacked(web: LocalWeb) -> None:
    cut = Wanted("*/*", 1000, lambda *_: True, is_cut=True, is_gzip_welcome=True)
    refused = Wanted("*/*", 1000, lambda *_: True, is_gzip_welcome=True)
    assert get(crawl_config(web), web.lookup, web.url(0, "/bomb/1"), wanted=cut) == ["200"]
    assert get(crawl_config(web), web.lookup, web.url(0, "/bomb/1"), wanted=refused) == ["too_large"]


def test_the_system_resolver_gives_plain_addresses_each_once() -> None:
    assert look_up("127.0.0.1", 80) == ["127.0.0.1"]
