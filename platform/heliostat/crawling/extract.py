"""Pages, WARC files and lists -> links tables, one a task: every link with its page, its text, and why it is refused."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.crawling.config import CrawlConfig, check_contact
from heliostat.crawling.fetch import Client, Lookup, look_up
from heliostat.crawling.links import PageImage, page_links
from heliostat.crawling.opt_out import header_opt_out, page_opt_out
from heliostat.crawling.politeness import Hosts
from heliostat.crawling.reasons import OK
from heliostat.crawling.tables import (
    FAILED_SCHEMA,
    LINKS_SCHEMA,
    TableWriter,
    batches_of,
    failed_key,
    links_key,
    table_to_bytes,
    text_table,
)
from heliostat.crawling.url_lists import LIST_SUFFIXES, read_url_list
from heliostat.crawling.urls import Checked, UrlFilter, url_filter
from heliostat.crawling.visit import Visitor
from heliostat.crawling.warc import Page, WarcCounts, warc_pages
from heliostat.data.windows import BytesOfObject
from heliostat.errors import DataError, UsageError
from heliostat.storage import Store, open_store

_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_WARC_SUFFIXES = (".warc", ".warc.gz")
_PAGES_PER_TASK = 1000
_PAGES_AT_ONCE = 1000
_ROWS_PER_BATCH = 2**16

Row = tuple[str, str, str, str | None, str, str]


def plan_inputs(config: CrawlConfig) -> list[dict[str, Any]]:
    """The tasks of ExtractLinks, in the order of the recipe: WARC files, pages, lists of images.

    UsageError without any input; DataError for one that is not there.
    """
    tasks: list[dict[str, Any]] = []
    for uri in config.warcs:
        store, keys = _files(uri, _WARC_SUFFIXES)
        tasks += [{"kind": "warc", "store": store, "keys": [key]} for key in keys]
    lists = tuple(f".{suffix}" for suffix in LIST_SUFFIXES)
    web: list[str] = []
    page_lists: list[tuple[str, str]] = []
    for entry in config.pages:
        if entry.startswith(("http://", "https://")):
            web.append(entry)
        elif _is_file(entry) and entry.lower().endswith(lists):
            store, keys = _files(entry, lists)
            page_lists += [(store, key) for key in keys]
        else:
            store, keys = _files(entry, _HTML_SUFFIXES)
            starts = range(0, len(keys), _PAGES_PER_TASK)
            tasks += [{"kind": "html", "store": store, "keys": keys[start : start + _PAGES_PER_TASK]} for start in starts]
    if web or page_lists:  # one task: only one process may ask a host for pages
        tasks.append({"kind": "web", "urls": web, "lists": page_lists})
    for uri in config.urls:
        store, keys = _files(uri, lists)
        tasks += [{"kind": "urls", "store": store, "keys": [key]} for key in keys]
    if not tasks:
        raise UsageError("the crawl has no input; set crawl.pages, crawl.warcs or crawl.urls")
    return [{"index": index, **task} for index, task in enumerate(tasks)]


def _is_file(uri: str) -> bool:
    return bool(PurePosixPath(uri).suffix) and not uri.endswith("/")


def _files(uri: str, suffixes: tuple[str, ...]) -> tuple[str, list[str]]:
    """(URI of the store, keys in it) of one file, or of all files below a folder whose names end so."""
    if _is_file(uri) and uri.lower().endswith(suffixes):
        folder, _, name = uri.rpartition("/")
        store = open_store(folder or ("/" if uri.startswith("/") else "."))
        if store.size(name) is not None:
            return store.uri, [name]
    store = open_store(uri)
    keys = [entry.key for entry in store.list() if entry.key.lower().endswith(suffixes)]
    if not keys:
        raise DataError(f"nothing at {uri} ends in {', '.join(suffixes)}; give such a file, or a folder of them")
    return store.uri, keys


@dataclass(frozen=True)
class ExtractLinks:
    """Does one task of `plan_inputs`: its failed pages and, last, its links into the work store. Can be pickled.

    lookup: how names of pages that are fetched are resolved (tests bring their own).
    """

    work: Store
    config: CrawlConfig
    lookup: Lookup = look_up

    def __call__(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns index, pages, failed_pages, links and refused (counts by reason); damage: the files that are not whole."""
        check_contact(self.config)
        account: dict[str, Any] = {"index": task["index"], "pages": 0, "failed": [], "damage": []}
        writer = TableWriter(LINKS_SCHEMA)
        reasons: dict[str, int] = {}
        for table in _batches(self._rows(task, account)) if task["kind"] != "urls" else self._of_list(task):
            writer.add(table)
            for entry in pc.value_counts(table["reason"]).to_pylist():
                reasons[entry["values"]] = reasons.get(entry["values"], 0) + entry["counts"]
        failed = text_table(account.pop("failed"), FAILED_SCHEMA)
        self.work.put(failed_key(task["index"]), table_to_bytes(failed))
        self.work.put(links_key(task["index"]), writer.finish())
        account["failed_pages"] = dict(sorted(Counter(failed["status"].to_pylist()).items()))
        return {**account, "links": writer.num_rows, "refused": {key: reasons[key] for key in sorted(reasons) if key}}

    def _rows(self, task: Mapping[str, Any], account: dict[str, Any]) -> Iterator[Row]:
        urls = url_filter(self.config.filter)
        if task["kind"] == "web":
            yield from self._of_web(task, urls, account)
            return
        for page in self._stored_pages(task, account):
            account["pages"] += 1
            yield from links_of_page(page, urls, self.config)

    def _stored_pages(self, task: Mapping[str, Any], account: dict[str, Any]) -> Iterator[Page]:
        store, limit = open_store(task["store"]), self.config.limits.max_page_bytes
        for key in task["keys"]:
            size = store.size(key) or 0
            if task["kind"] == "html":
                html = store.read_range(key, 0, min(size, limit)) if size else b""
                yield Page(f"https://{quote(key)}", html, "text/html")
                continue
            counts = WarcCounts()
            yield from warc_pages(BytesOfObject(store, key, size), counts, max_page_bytes=limit)
            if counts.damage:
                account["damage"].append(f"{key}: {counts.damage}, after {counts.num_pages} pages")

    def _of_web(self, task: Mapping[str, Any], urls: UrlFilter, account: dict[str, Any]) -> Iterator[Row]:
        """Links of pages that are fetched, in the order in which the pages are given, whichever comes first."""
        with asyncio.Runner() as runner:
            client = Client(self.config, urls.guard, self.lookup)
            runner.run(client.__aenter__())
            visitor = Visitor(self.config, urls, client, Hosts(self.config.politeness))
            try:
                for wanted in _wanted_pages(task):
                    for url, found in zip(wanted, runner.run(self._fetch(wanted, visitor, urls)), strict=True):
                        if isinstance(found, str):
                            account["failed"].append((url, "", "", None, found))
                        else:
                            account["pages"] += 1
                            yield from found
            finally:
                runner.run(visitor.close())
                runner.run(client.__aexit__(None, None, None))

    async def _fetch(self, wanted: Sequence[str], visitor: Visitor, urls: UrlFilter) -> list[list[Row] | str]:
        """For each URL the links of its page, or the reason why there is no page."""

        async def fetch_one(url: str) -> list[Row] | str:
            found = await visitor.page(url)
            if found.status != OK:
                return found.status
            page = Page(found.final_url, found.body, found.header("content-type") or "", found.headers)
            return list(links_of_page(page, urls, self.config))

        jobs = [asyncio.ensure_future(fetch_one(url)) for url in wanted]
        _, late = await asyncio.wait(jobs, timeout=self.config.limits.task_deadline_seconds)
        for job in late:
            job.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return ["straggler" if job in late else job.result() for job in jobs]

    def _of_list(self, task: Mapping[str, Any]) -> Iterator[pa.Table]:
        urls, store = url_filter(self.config.filter), open_store(task["store"])
        for key in task["keys"]:
            for table in read_url_list(store, key):
                checked = [urls.check(text) for text in table["url"].to_pylist()]
                columns = [[found.url for found in checked], [""] * len(checked), [found.reason for found in checked]]
                url, opt_out, reason = (pa.array(column, pa.string()) for column in columns)
                yield pa.Table.from_arrays(
                    [url, table["page"], table["alt"], table["licence"], opt_out, reason], schema=LINKS_SCHEMA
                )


def _wanted_pages(task: Mapping[str, Any]) -> Iterator[list[str]]:
    """The page URLs of a task in batches, each URL once a batch."""
    if task["urls"]:
        yield list(dict.fromkeys(task["urls"]))
    for uri, key in task["lists"]:
        for table in read_url_list(open_store(uri), key):
            for batch in batches_of(table, _PAGES_AT_ONCE):
                yield list(dict.fromkeys(batch["url"].to_pylist()))


def _batches(rows: Iterable[Row]) -> Iterator[pa.Table]:
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) >= _ROWS_PER_BATCH:
            yield text_table(held, LINKS_SCHEMA)
            held = []
    if held:
        yield text_table(held, LINKS_SCHEMA)


def links_of_page(page: Page, urls: UrlFilter, config: CrawlConfig) -> Iterator[Row]:
    """Every link of a page as a row of LINKS_SCHEMA, in its order."""
    found, here = page_links(page.html, page.content_type), urls.check(page.url, is_page=True)
    base = here.url
    if found.base:
        given = urls.check(found.base, here.url, is_page=True)
        base = given.url if not given.reason else base
    opt_out = header_opt_out(page.headers, config.politeness, config.user_agent)
    opt_out = opt_out or page_opt_out(found.robots, config.politeness, config.user_agent)
    page_reason = "opt_out" if opt_out else "restricted_page" if here.reason == "restricted_domain" else ""
    licence = urls.check(found.licence, base, is_page=True) if found.licence else None
    licence_url = licence.url if licence is not None and not licence.reason else None
    left = config.filter.max_links_per_page
    for image in found.images:
        for checked in _of_image(image, base, urls, every=config.filter.every_candidate):
            reason = checked.reason or page_reason or ("" if left > 0 else "over_page_limit")
            left -= not reason
            yield checked.url, here.url, image.alt, licence_url, opt_out, reason


def _of_image(image: PageImage, base: str, urls: UrlFilter, *, every: bool) -> Iterator[Checked]:
    """The candidates of one image, as written, each URL once; all but the best allowed one are `other_candidate`."""
    checked: dict[str, tuple[Checked, tuple[int, float]]] = {}
    for candidate in image.candidates:
        found = urls.check(candidate.url, base)
        if found.url not in checked or candidate.weight > checked[found.url][1]:
            checked[found.url] = found, candidate.weight
    allowed = [(weight, -place) for place, (found, weight) in enumerate(checked.values()) if not found.reason]
    best = max(allowed, default=None)
    for place, (found, weight) in enumerate(checked.values()):
        is_other = not every and not found.reason and (weight, -place) != best
        yield found._replace(reason="other_candidate") if is_other else found
