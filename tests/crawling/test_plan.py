"""Links of many tables become tasks: every URL once, a host in one task, in an order that follows from the input alone."""

import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from heliostat.crawling import plan as plan_module
from heliostat.crawling.plan import Plan, host_of, plan_downloads
from heliostat.crawling.tables import LINKS_SCHEMA, PLAN_SCHEMA, links_key, plan_key, read_table, table_to_bytes, text_table
from heliostat.errors import DataError
from heliostat.storage import LocalStore

Row = tuple[str, str, str, str | None, str, str]


def write(folder: Path, tables: list[list[Row]]) -> tuple[LocalStore, list[str]]:
    work = LocalStore(folder)
    for index, rows in enumerate(tables):
        work.put(links_key(index), table_to_bytes(text_table(rows, LINKS_SCHEMA)))
    return work, [links_key(index) for index in range(len(tables))]


def tasks_of(work: LocalStore, plan: Plan) -> list[list[dict[str, object]]]:
    return [read_table(work, plan_key(index), PLAN_SCHEMA).to_pylist() for index in range(len(plan.tasks))]


def many_links(seed: int, num_tables: int = 7) -> list[list[Row]]:
    generator, tables = random.Random(seed), []
    for table in range(num_tables):
        rows: list[Row] = []
        for number in range(generator.randrange(400)):
            host = f"h{int(generator.paretovariate(0.7)) % 97}.org{generator.choice(('', ':8080'))}"
            url = f"http://{host}/{generator.randrange(60)}.jpg"
            reason = generator.choices(("", "opt_out", "scheme", "port"), (90, 2, 5, 3))[0]
            rows.append(
                (url, f"http://p.org/{table}/{number}", str(number), None, "meta: noai" * (reason == "opt_out"), reason)
            )
        tables.append(rows)
    return tables


def slow_plan(tables: list[list[Row]]) -> tuple[dict[str, str], Counter[str]]:
    """URL -> page of its first link, and refused links by reason, by a set and two loops."""
    rows = [row for table in tables for row in table]
    out = {row[0] for row in rows if row[5] == "opt_out"}
    first: dict[str, str] = {}
    refused: Counter[str] = Counter()
    for url, page, _, _, _, reason in rows:
        if reason not in ("", "opt_out"):
            refused[reason] += 1
        elif url in out:
            refused["opt_out"] += 1
        else:
            first.setdefault(url, page)
    return first, refused


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows_per_bucket", [10**6, 100])
def test_a_plan_says_what_a_slow_one_says(tmp_path: Path, seed: int, rows_per_bucket: int) -> None:
    tables = many_links(seed)
    work, keys = write(tmp_path, tables)
    plan = plan_downloads(work, keys, urls_per_task=50, rows_per_bucket=rows_per_bucket)
    first, refused = slow_plan(tables)
    tasks = tasks_of(work, plan)
    rows = [row for task in tasks for row in task]
    assert {row["url"]: row["page"] for row in rows} == first
    assert len(rows) == len(first) == plan.num_urls
    assert plan.refused == dict(refused)
    assert plan.num_links == sum(map(len, tables))
    assert [len(task) for task in tasks] == plan.tasks
    assert max(plan.tasks) <= 50
    sizes = Counter(host_of(str(row["url"])) for row in rows)
    for host, size in sizes.items():
        holding = [task for task in tasks if any(host_of(str(row["url"])) == host for row in task)]
        assert len(holding) == -(-size // 50), host
        if size > 50:
            assert {row["share"] for task in holding for row in task} == {len(holding)}
            assert all({host_of(str(row["url"])) for row in task} == {host} for task in holding)
        else:
            places = [place for place, row in enumerate(holding[0]) if host_of(str(row["url"])) == host]
            assert places == list(range(places[0], places[0] + size)), "in a row"
    assert [entry.key for entry in work.list("plan/_spill/")] == []


def test_a_plan_is_the_same_to_the_byte_however_it_is_spilled_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = many_links(9)
    found = []
    for run, spill_bytes in enumerate((2**30, 5000)):
        monkeypatch.setattr(plan_module, "_SPILL_BYTES", spill_bytes)
        work, keys = write(tmp_path / str(run), tables)
        plan = plan_downloads(work, keys, urls_per_task=50, rows_per_bucket=300)
        found.append([(entry.key, work.read(entry.key)) for entry in work.list("plan/")])
        assert plan_downloads(work, [], urls_per_task=1) == plan
    assert found[0] == found[1]
    assert len(found[0]) > 5


@pytest.mark.parametrize(
    "rows", [[], [("x", "", "", None, "", "scheme")], [("http://a.org/1", "", "", None, "meta: noai", "opt_out")]]
)
def test_nothing_to_do_is_a_plan_without_tasks(tmp_path: Path, rows: list[Row]) -> None:
    plan = plan_downloads(*write(tmp_path, [rows]), urls_per_task=10)
    assert (plan.num_urls, plan.tasks, sum(plan.refused.values())) == (0, [], len(rows))
    assert plan_downloads(LocalStore(tmp_path / "none"), [], urls_per_task=10).tasks == []


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    work, keys = write(tmp_path, [[]])
    work.put(keys[0], b"PAR1 no")
    with pytest.raises(DataError, match=r"links/000000\.parquet"):
        plan_downloads(work, keys, urls_per_task=10)


def test_100_000_links_are_planned_in_seconds(tmp_path: Path) -> None:
    generator, work = np.random.default_rng(1), LocalStore(tmp_path)
    hosts = generator.zipf(1.3, 100_000) % 20_000
    urls = [
        f"http://host{host}.example.org/{number}.jpg"
        for host, number in zip(hosts, generator.integers(0, 10**6, 100_000), strict=True)
    ]
    columns = [
        pa.array(urls),
        *([pa.array([""] * len(urls))] * 2),
        pa.nulls(len(urls), pa.string()),
        *([pa.array([""] * len(urls))] * 2),
    ]
    work.put(links_key(0), table_to_bytes(pa.Table.from_arrays(columns, schema=LINKS_SCHEMA)))
    started = time.process_time()
    plan = plan_downloads(work, [links_key(0)], urls_per_task=10_000, rows_per_bucket=30_000)
    assert time.process_time() - started < 10
    assert plan.num_urls == len(set(urls))
    assert plan.num_hosts == len({host_of(url) for url in urls})
