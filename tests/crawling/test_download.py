"""A web of hundreds of pages and dozens of hosts on loopback, good and hostile, from links to shards."""

import itertools
import json
import pickle
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_web import DOMAIN, LocalWeb, crawl_config, local_web, png, site

from heliostat.crawling.download import DownloadUrls, Spool, pack_downloads, retry_list
from heliostat.crawling.extract import ExtractLinks, plan_inputs
from heliostat.crawling.plan import Plan, plan_downloads
from heliostat.crawling.reasons import OK, REASONS
from heliostat.crawling.tables import (
    FAILED_SCHEMA,
    LINKS_SCHEMA,
    LOG_SCHEMA,
    failed_key,
    links_key,
    log_key,
    plan_key,
    read_table,
    table_to_bytes,
    text_table,
)
from heliostat.crawling.visit import Visited
from heliostat.data.manifest import manifest_from_bytes
from heliostat.data.packing import Packed, Packing
from heliostat.data.shard_image import image_id
from heliostat.data.shards import read_shard
from heliostat.errors import DataError, UsageError
from heliostat.storage import LocalStore

NUM_HOSTS, PAGES_PER_HOST = 60, 5


@pytest.fixture(scope="module")
def web() -> Iterator[LocalWeb]:
    with local_web(NUM_HOSTS) as running:
        yield running


def write_links(work: LocalStore, urls: Sequence[str]) -> None:
    work.put(links_key(0), table_to_bytes(text_table([(url, "", "", None, "", "") for url in urls], LINKS_SCHEMA)))


def download(
    web: LocalWeb, folder: Path, urls: Sequence[str], *, packing: Packing | None = None, **changes: object
) -> tuple[dict[str, dict[str, object]], Packed, dict[str, bytes], Plan]:
    """(log rows by URL, what was packed, shards, plan) of one task."""
    work, shards = LocalStore(folder), dict[str, bytes]()
    write_links(work, urls)
    plan = plan_downloads(work, [links_key(0)], urls_per_task=10_000)
    packed = pack_downloads(work, 0, crawl_config(web, **changes), packing or Packing(), shards.__setitem__, lookup=web.lookup)
    rows = read_table(work, log_key(0), LOG_SCHEMA).to_pylist()
    return {row["url"]: row for row in rows}, packed, shards, plan


def test_a_web_of_300_pages_on_60_hosts_goes_from_pages_to_shards(web: LocalWeb, tmp_path: Path) -> None:
    pages, expected = [], set[str]()
    for host, number in itertools.product(range(NUM_HOSTS), range(PAGES_PER_HOST)):
        images = [web.url(host, f"/img/{number}-{place}.png") for place in range(3)]
        images += [web.url((host + 7) % NUM_HOSTS, f"/img/shared-{number}.png")]
        html = "".join(f'<p><img alt="{place}" src="{url}"></p>' for place, url in enumerate(images))
        expected |= set(images)
        web.pages[site(host), f"/page/{number}"] = f"<html>{html}<img src='http://127.0.0.1/x.png'></html>".encode()
        pages.append(web.url(host, f"/page/{number}"))
    (tmp_path / "pages.txt").write_text("\n".join(pages))
    work, files = LocalStore(tmp_path / "work"), LocalStore(tmp_path / "files")
    config = crawl_config(web, pages=(str(tmp_path / "pages.txt"),), urls_per_task=300)
    (task,) = plan_inputs(config)
    account = pickle.loads(pickle.dumps(ExtractLinks(work, config)))  # as it travels to a worker
    account = ExtractLinks(work, config, web.lookup)(json.loads(json.dumps(task)))
    assert (account["pages"], account["links"], account["failed_pages"]) == (300, 1500, {})
    assert account["refused"] == {"forbidden_address": 300}
    plan = plan_downloads(work, [links_key(0)], urls_per_task=config.urls_per_task)
    assert (plan.num_links, plan.num_urls, plan.num_repeated, plan.num_hosts) == (1500, len(expected), 0, NUM_HOSTS)
    assert len(plan.tasks) > 3
    seen: dict[str, int] = {}
    function = DownloadUrls(work, files, config, Packing(), web.lookup)
    for task in plan.task_list:
        result = function(task)
        assert result["statuses"] == {OK: plan.tasks[task["index"]]}
        for row in read_table(work, log_key(task["index"]), LOG_SCHEMA).to_pylist():
            assert seen.setdefault(row["host"], task["index"]) == task["index"], "a host is in one task"
            assert (row["address"], row["robots"], row["attempts"]) == (web.hosts[row["host"]], "none", 1)
            assert row["alt"] in "0123"
        rows = manifest_from_bytes(files.read(f"_work/rows/{task['index']:06d}.parquet"))
        for key in result["written"]:
            assert [image.id for image in read_shard(files.read(key))] == rows.filter(pa.compute.equal(rows["shard"], key))[
                "id"
            ].to_pylist()
    assert len(seen) == NUM_HOSTS
    assert all(web.asked(host).count("/robots.txt") <= 2 for host in range(NUM_HOSTS)), "once for pages, once for images"
    assert {request.agent for request in web.requests} == {"HeliostatBot/1.0 (+https://example.org/crawl)"}
    assert not any("cookie" in request.headers.lower() for request in web.requests)


HOSTILE = {
    "silent/1": "timeout",
    "drip/1": "timeout",
    "drip-head/1": "timeout",
    "endless/1": "too_large",
    "announced/1": "too_large",
    "header-line/1": "bad_response",
    "header-lines/1": "bad_response",
    "short/1": "truncated",
    "reset/1": "reset",
    "garbage/1": "bad_response",
    "bad-length/1": "bad_response",
    "bad-chunk/1": "bad_response",
    "encoded/1": "bad_encoding",
    "bomb/1": "bad_encoding",
    "html/1.jpg": "not_an_image",
    "status/404": "not_found",
    "status/410": "not_found",
    "status/403": "refused",
    "status/451": "refused",
    "status/500": "server_error",
    "status/202": "http_error",
    "status/418": "http_error",
    "redirect/3": "redirects",
    "redirect/2": OK,
    "redirect/999": "redirects",
    "to/http://127.0.0.1/a.png": "forbidden_address",
    "to/http://[::ffff:127.0.0.1]/a.png": "forbidden_address",
    "to/file:///etc/passwd": "scheme",
    "to/http://a:b@site001.heliostat-web.org/": "userinfo",
    f"to/http://absent.{DOMAIN}/a.png": "dns",
    "tag/noai": "opt_out",
    "tag/googlebot:_noai,_heliostatbot:_noml": "opt_out",
    "tag/otherbot:_noai": OK,
    "once/503": OK,
    "once/429-0": OK,
    "once/503-9999": "busy",
}


def test_every_hostile_answer_has_its_reason_and_good_ones_beside_it_arrive(web: LocalWeb, tmp_path: Path) -> None:
    urls = {web.url(number, f"/{path}"): status for number, (path, status) in enumerate(HOSTILE.items())}
    good = [web.url(number, "/img/beside.png") for number in range(40, 60)]
    urls |= dict.fromkeys(good, OK) | {
        f"http://absent.{DOMAIN}/a.png": "dns",
        "http://site001.heliostat-web.org:443/a.png": "connect",
    }
    started = time.monotonic()
    log, packed, _, plan = download(web, tmp_path, list(urls))
    assert time.monotonic() - started < 20
    assert {url: row["status"] for url, row in log.items()} == urls
    assert packed.account.num_in == plan.num_urls == len(urls)
    assert Counter(rejection.reason for rejection in packed.rejections) == Counter(set_ for set_ in urls.values() if set_ != OK)
    assert set(urls.values()) - {OK} <= set(REASONS)
    assert log[web.url(list(HOSTILE).index("once/503"), "/once/503")]["attempts"] == 2
    assert {row["url"] for row in retry_list(pa.Table.from_pylist(list(log.values()), LOG_SCHEMA)).to_pylist()} == {
        url for url, status in urls.items() if status in REASONS and REASONS[status].may_pass
    }


def test_robots_txt_is_respected_on_every_way(web: LocalWeb, tmp_path: Path) -> None:
    rules = (
        b"User-agent: *\nDisallow: /\n\nUser-agent: heliostatbot\nDisallow: /private\nAllow: /private/open\nDisallow: /*.gif$\n"
    )
    large = b"# " + b"x" * 600_000 + b"\nUser-agent: *\nDisallow: /\n"
    answers = {
        0: (200, "", rules),
        1: (404, "", b""),
        2: (403, "", b""),
        3: (503, "", b""),
        4: (301, f"Location: {web.url(0, '/robots.txt')}\r\n", b""),
        5: (302, "Location: /robots.txt\r\n", b""),  # for ever
        6: (200, "", large),  # beyond 500 KiB nothing counts
        7: (200, "Content-Type: text/html\r\n", b"<html>\xff\xfe not a robots.txt \x00</html>"),
        8: (429, "", b""),
        9: (200, "", b"\xef\xbb\xbfUser-agent: HeliostatBot\r\nDisallow: /img\r\n"),
        10: (200, "", b"User-agent: *\nDisallow:\n"),
    }
    expected = {
        web.url(0, "/img/1.png"): (OK, "allowed"),
        web.url(0, "/private/1.png"): ("robots", "disallowed"),
        web.url(0, "/img/1.gif"): ("robots", "disallowed"),
        web.url(0, "/x/../private/1.png"): ("robots", "disallowed"),
        web.url(1, "/img/1.png"): (OK, "none"),
        web.url(2, "/img/1.png"): (OK, "none"),
        web.url(3, "/img/1.png"): ("robots_unreachable", "unreachable"),
        web.url(4, "/private/1.png"): ("robots", "disallowed"),
        web.url(5, "/img/1.png"): (OK, "none"),
        web.url(6, "/img/1.png"): (OK, "allowed"),
        web.url(7, "/img/1.png"): (OK, "allowed"),
        web.url(8, "/img/1.png"): ("robots_unreachable", "unreachable"),
        web.url(9, "/img/1.png"): ("robots", "disallowed"),
        web.url(10, "/img/1.png"): (OK, "allowed"),
        web.url(11, f"/to/{web.url(0, '/private/2.png')}"): ("robots", "disallowed"),
    }
    web.requests.clear()
    web.robots.update({site(number): answer for number, answer in answers.items()})
    log, *_ = download(web, tmp_path, list(expected))
    web.robots.clear()
    assert {url: (row["status"], row["robots"]) for url, row in log.items()} == expected
    asked = {request.path for request in web.requests if request.host in (site(0), site(3), site(4), site(8), site(9))}
    assert asked == {"/robots.txt", "/img/1.png"}, "nothing disallowed was asked for"
    assert web.asked(3).count("/img/1.png") == 0


def test_a_host_is_asked_no_faster_and_by_no_more_at_once_than_it_likes(web: LocalWeb, tmp_path: Path) -> None:
    urls = [web.url(host, f"/img/pace-{number}.png") for host in (20, 21, 22) for number in range(6)]
    web.robots[site(22)] = (200, "", b"User-agent: *\nCrawl-delay: 0.2\nDisallow:\n")
    web.requests.clear()
    web.most_at_once.clear()
    web.delay_seconds = lambda _: 0.05
    try:
        log, *_ = download(web, tmp_path, urls, politeness={"requests_per_second": 10.0, "connections_per_host": 2})
    finally:
        web.delay_seconds = lambda _: 0.0
        web.robots.clear()
    assert {row["status"] for row in log.values()} == {OK}
    for host, least_seconds in ((20, 0.1), (21, 0.1), (22, 0.2)):
        times = [request.seconds for request in web.requests if request.host == site(host)]
        assert len(times) == 7
        assert times[-1] - times[1] > 5 * least_seconds - 0.1, (host, times)  # a late arrival of the first may cost a little
        assert web.most_at_once[site(host)] <= 2


def test_a_host_that_is_down_is_left_alone(web: LocalWeb, tmp_path: Path) -> None:
    urls = [web.url(host, f"/reset/{number}.png") for host in (30, 31) for number in range(30)]
    log, *_ = download(web, tmp_path, urls, politeness={"max_host_failures": 5})
    assert Counter(row["status"] for row in log.values())["host_down"] > 40
    assert len(web.asked(30)) < 16
    assert {row["status"] for row in log.values()} == {"host_down", "reset"}


def test_the_bytes_do_not_depend_on_what_comes_first(web: LocalWeb, tmp_path: Path) -> None:
    urls = [web.url(host, f"/img/order-{number}.png") for host in range(20) for number in range(5)]
    urls += [web.url(host, "/tag/noai") for host in range(5)] + [web.url(5, "/status/404"), web.url(6, "/html/1.jpg")]
    found = []
    for run in range(3):
        generator = random.Random(run)
        web.delay_seconds = lambda _, generator=generator: generator.random() * 0.05
        packing = Packing(images_per_shard=30, shard_bytes=10_000, format="parquet" if run == 2 else "tar")
        _, packed, shards, _ = download(web, tmp_path / str(run), urls, packing=packing)
        found.append((shards, packed.rows, LocalStore(tmp_path / str(run)).read(log_key(0)), packed.rejections))
    web.delay_seconds = lambda _: 0.0
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]
    assert found[0][2] == found[1][2] == found[2][2]
    assert found[0][3] == found[1][3]
    assert len(found[0][0]) > 3
    images = [image for key in sorted(found[0][0]) for image in read_shard(found[0][0][key])]
    planned = read_table(LocalStore(tmp_path / "0"), plan_key(0), pa.schema([pa.field("url", pa.string())]))["url"].to_pylist()
    assert [image.source for image in images] == [url for url in planned if "/img/" in url], "in the order of the task"
    assert all(image.id == image_id(image.data) for image in images)


def test_a_task_ends_at_its_deadline_and_stragglers_can_be_retried(web: LocalWeb, tmp_path: Path) -> None:
    quick = [web.url(host, "/img/quick.png") for host in range(10)]
    slow = [web.url(10, f"/img/slow-{number}.png") for number in range(100)]
    started = time.monotonic()
    log, *_ = download(
        web, tmp_path / "a", quick + slow, politeness={"requests_per_second": 4.0}, limits={"task_deadline_seconds": 1.0}
    )
    assert time.monotonic() - started < 10
    statuses = Counter(row["status"] for row in log.values())
    assert statuses["straggler"] > 80
    assert statuses["straggler"] + statuses[OK] == 110
    assert statuses[OK] >= 10

    again = retry_list(read_table(LocalStore(tmp_path / "a"), log_key(0), LOG_SCHEMA))
    pq.write_table(again, tmp_path / "again.parquet")
    config = crawl_config(web, urls=(str(tmp_path / "again.parquet"),))
    work = LocalStore(tmp_path / "b")
    (task,) = plan_inputs(config)
    assert ExtractLinks(work, config)(task)["links"] == statuses["straggler"]
    plan_downloads(work, [links_key(0)], urls_per_task=1000)
    packed = pack_downloads(work, 0, config, Packing(), lambda *_: None, lookup=web.lookup)
    assert packed.account.num_images == statuses["straggler"]


def test_the_last_few_may_not_drag_on(web: LocalWeb, tmp_path: Path) -> None:
    urls = [web.url(host, "/img/most.png") for host in range(50)] + [web.url(51, "/silent/1")]
    changes = {"request_seconds": 30.0, "idle_seconds": 30.0, "straggler_ratio": 0.05, "straggler_seconds": 0.5}
    started = time.monotonic()
    log, *_ = download(web, tmp_path, urls, limits=changes)
    assert time.monotonic() - started < 15
    assert Counter(row["status"] for row in log.values()) == {OK: 50, "straggler": 1}


def test_the_licence_of_a_page_or_of_an_answer_is_kept(web: LocalWeb, tmp_path: Path) -> None:
    web.pages[site(15), "/licensed"] = b'<a rel=license href="https://cc.org/by"></a><img src=/img/licensed.png>'
    work, shards = LocalStore(tmp_path), dict[str, bytes]()
    config = crawl_config(web, pages=(web.url(15, "/licensed"), web.url(15, "/absent"), "http://127.0.0.1/"))
    (task,) = plan_inputs(config)
    account = ExtractLinks(work, config, web.lookup)(task)
    assert account["failed_pages"] == {"not_found": 1, "forbidden_address": 1}
    failed = read_table(work, failed_key(0), FAILED_SCHEMA)
    assert failed["url"].to_pylist() == [web.url(15, "/absent"), "http://127.0.0.1/"]
    assert retry_list(failed).num_rows == 0
    plan_downloads(work, [links_key(0)], urls_per_task=10)
    pack_downloads(work, 0, config, Packing(), shards.__setitem__, lookup=web.lookup)
    (row,) = read_table(work, log_key(0), LOG_SCHEMA).to_pylist()
    assert (row["licence"], row["page"], row["etag"]) == ("https://cc.org/by", web.url(15, "/licensed"), '"licensed"')
    ((image,),) = (list(read_shard(data)) for data in shards.values())
    assert image.metadata == {"licence": "https://cc.org/by", "page": web.url(15, "/licensed")}


def test_pages_that_are_bombs_or_slow_do_not_hold_up_the_others(web: LocalWeb, tmp_path: Path) -> None:
    web.pages[site(16), "/good"] = b"<img src=/img/a.png>"
    pages = (
        web.url(16, "/bomb/1"),
        web.url(17, "/endless/1"),
        web.url(18, "/silent/1"),
        web.url(16, "/good"),
        web.url(19, "/tag/noai"),
    )
    config = crawl_config(web, pages=pages, limits={"max_page_bytes": 2**20})
    account = ExtractLinks(LocalStore(tmp_path), config, web.lookup)(plan_inputs(config)[0])
    assert account["failed_pages"] == {"timeout": 1}
    assert (account["pages"], account["links"]) == (4, 1)


def test_no_input_and_no_contact_are_usage_errors(web: LocalWeb, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no input"):
        plan_inputs(crawl_config(web))
    config = crawl_config(web, contact="")
    with pytest.raises(UsageError, match="contact"):
        ExtractLinks(LocalStore(tmp_path), config)({"index": 0, "kind": "web", "urls": [], "lists": []})
    with pytest.raises(UsageError, match="contact"):
        pack_downloads(LocalStore(tmp_path), 0, config, Packing(), lambda *_: None)


def test_no_proxy_of_the_environment_is_used(web: LocalWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    log, *_ = download(web, tmp_path, [web.url(25, "/img/direct.png")])
    assert [row["status"] for row in log.values()] == [OK]


def test_a_full_disk_is_one_line_and_not_a_shard_with_holes() -> None:
    spool, limits = Spool(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot keep an answer on the disk: .*TMPDIR"):
            list(map(spool.keep, [Visited(OK, png(seed)) for seed in range(100)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        spool.close()
