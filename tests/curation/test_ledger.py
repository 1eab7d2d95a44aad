"""The ledger: verdicts, the shuffle that writes it, look-ups in it, and its funnel."""

import hashlib
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.curation.ledger import (
    LEDGER_INDEX,
    SCHEMA,
    Decisions,
    FunnelStep,
    StageCount,
    Verdicts,
    check_funnel,
    named_reasons,
    same_reason,
)
from heliostat.curation.ledger_facts import LedgerFacts, RetrievedBy, hex_to_ids, ids_to_hex
from heliostat.curation.ledger_keys import hash_strings
from heliostat.curation.ledger_read import open_ledger
from heliostat.curation.ledger_write import TableRows, ledger_bytes, write_ledger
from heliostat.curation.report import render_funnel
from heliostat.curation.tasks import run_serially
from heliostat.errors import DataError
from heliostat.storage import LocalStore


def identity(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def pool_rows(ids: list[str], sources: list[str]) -> pa.Table:
    count = len(ids)
    return pa.table(
        {
            "id": ids,
            "source": sources,
            "label": pa.nulls(count, pa.string()),
            "shard": ["shards/000000.tar"] * count,
            "offset": pa.array(range(512, 512 + 1024 * count, 1024), pa.int64()),
            "length": pa.array([1000] * count, pa.int64()),
            "width": pa.array([64] * count, pa.int32()),
            "height": pa.array([48] * count, pa.int32()),
            "format": ["png"] * count,
            "reason": [""] * count,
            "detail": [""] * count,
            "nsfw": pa.array([0.25] * count, pa.float32()),
            "faces": pa.array([[{"left": 0.5}]] + [[]] * (count - 1)) if count else pa.nulls(0, pa.list_(pa.int32())),
        }
    )


def outside_rows(count: int) -> pa.Table:
    return pa.table(
        {
            "source": [f"https://gone.example/{number}" for number in range(count)],
            "stage": ["crawl"] * count,
            "reason": ["http_404" if number % 3 else "robots_disallowed" for number in range(count)],
            "detail": ["status 404"] * count,
            "http_status": pa.array([404] * count, pa.int32()),
        }
    )


def split(table: pa.Table, size: int) -> TableRows:
    return TableRows(tuple(table.slice(start, size) for start in range(0, table.num_rows, size)))


def random_pool(count: int, seed: int) -> tuple[pa.Table, LedgerFacts, Decisions]:
    """Repeated ids and sources, three stages that drop at random, and facts of every kind."""
    draw = random.Random(seed)
    numpy_draw = np.random.default_rng(seed)
    table = pool_rows(
        [identity(draw.randrange(count)) for _ in range(count)],
        [f"https://host{draw.randrange(9)}.example/{draw.randrange(count)}.jpg" for _ in range(count)],
    )
    decisions = Decisions.of(count)
    for stage, reasons in (("decode", ("truncated", "too_large")), ("copies", ("copy",)), ("balance", ("over_cluster_level",))):
        rows = decisions.rows
        codes = numpy_draw.integers(0, len(reasons), len(rows)).astype(np.uint8)
        decisions.judge(Verdicts(stage, rows, numpy_draw.random(len(rows)) < 0.3, reasons, codes))
    pool = np.sort(numpy_draw.integers(0, count, count // 2))
    links = RetrievedBy(
        pool,
        numpy_draw.integers(0, 5, len(pool)),
        np.arange(len(pool), dtype=np.int32),
        numpy_draw.random(len(pool)).astype(np.float32),
        (pool % 2).astype(np.uint8),
        (("flowers", "sample"), ("birds", "cluster")),
        hex_to_ids(pa.array([identity(10_000 + number) for number in range(5)])),
    )
    facts = LedgerFacts(
        hex_to_ids(table["id"]),
        nearest=np.arange(count)[::-1] - 1,
        similarity=numpy_draw.random(count).astype(np.float32),
        component=numpy_draw.integers(-1, 7, count),
        representative=np.arange(count) // 2,
        similarity_to_representative=numpy_draw.random(count).astype(np.float32),
        reference=numpy_draw.integers(-1, 2, count),
        similarity_to_reference=numpy_draw.random(count).astype(np.float32),
        reference_ids=hex_to_ids(pa.array([identity(-1), identity(-2)])),
        evaluation_set=np.array([0, 1], np.uint8),
        evaluation_sets=("val", "test"),
        retrieved_by=links,
        cluster_levels=np.stack([np.arange(count) % 5 - 1, np.arange(count) % 2], axis=1).astype(np.int32),
        faces_blurred=np.arange(count) % 2 == 0,
    )
    return table, facts, decisions


def slow_rows(table: pa.Table, facts: LedgerFacts, decisions: Decisions) -> list[dict]:
    """Every row as a mapping, one at a time, sorted as the ledger promises."""
    ids, rows = table["id"].to_pylist(), []
    for row, known in enumerate(table.to_pylist()):
        stage, reason = decisions.causes[decisions.cause[row]]
        reference = int(facts.reference[row])
        component = int(facts.component[row])
        nearest = int(facts.nearest[row])
        links = [link for link in range(len(facts.retrieved_by.pool)) if facts.retrieved_by.pool[link] == row]
        levels = facts.cluster_levels[row].tolist()
        rows.append(
            {name: known.get(name) for name in SCHEMA.names}
            | {
                "detail": known["detail"] or None,
                "num_faces": len(known["faces"]),
                "row": row,
                "decision": "dropped" if stage else "kept",
                "stage": stage or None,
                "reason": reason or None,
                "nearest_copy": None if nearest < 0 else ids[nearest],
                "similarity": None if nearest < 0 else float(facts.similarity[row]),
                "component": None if component < 0 else component,
                "component_size": None if component < 0 else int((facts.component == component).sum()),
                "representative": ids[facts.representative[row]],
                "similarity_to_representative": float(facts.similarity_to_representative[row]),
                "nearest_reference": None if reference < 0 else identity(-1 - reference),
                "evaluation_set": None if reference < 0 else ("val", "test")[reference],
                "similarity_to_reference": None if reference < 0 else float(facts.similarity_to_reference[row]),
                "retrieved_by": [
                    {
                        "set": ("flowers", "birds")[facts.retrieved_by.set_code[link]],
                        "mode": ("sample", "cluster")[facts.retrieved_by.set_code[link]],
                        "curated_id": identity(10_000 + int(facts.retrieved_by.curated[link])),
                        "rank": link,
                        "similarity": float(facts.retrieved_by.similarity[link]),
                    }
                    for link in links
                ],
                "cluster_levels": None if min(levels) < 0 else levels,
                "faces_blurred": row % 2 == 0,
            }
        )
    return sorted(rows, key=lambda row: (row["id"], row["source"], row["shard"], row["offset"]))


def test_the_ledger_holds_every_row_as_a_loop_over_single_rows_would_write_it(tmp_path):
    table, facts, decisions = random_pool(300, seed=1)
    outside = outside_rows(50)
    before = [StageCount("crawl", 350, 300)]
    write_ledger(
        LocalStore(tmp_path), split(table, 37), facts, decisions, outside=split(outside, 20), before=before, rows_per_file=64
    )
    ledger = open_ledger(LocalStore(tmp_path))
    found = pa.concat_tables(ledger.rows()).to_pylist()
    assert found[:300] == slow_rows(table, facts, decisions)
    unread = sorted(found[300:], key=lambda row: row["source"])
    assert [row["source"] for row in unread] == sorted(outside["source"].to_pylist())
    assert {(row["decision"], row["stage"], row["http_status"], row["id"], row["row"]) for row in unread} == {
        ("dropped", "crawl", 404, None, None)
    }
    steps = ledger.funnel()
    assert [step.stage for step in steps] == ["crawl", "decode", "copies", "balance"]
    assert steps[0] == FunnelStep("crawl", 350, 300, {"http_404": 33, "robots_disallowed": 17})
    told = Counter((row["stage"], row["reason"]) for row in found if row["decision"] == "dropped")
    assert {(step.stage, reason): count for step in steps for reason, count in step.dropped_by_reason.items()} == told


def test_every_row_is_found_by_its_id_its_first_digits_and_its_source(tmp_path):
    table, facts, decisions = random_pool(200, seed=2)
    outside = outside_rows(30)
    files = LocalStore(tmp_path)
    write_ledger(
        files, split(table, 50), facts, decisions,
        outside=TableRows((outside,)), before=[StageCount("crawl", 230, 200)], rows_per_file=32,
    )  # fmt: skip
    ledger, known = open_ledger(files), table.to_pylist()
    for row in known[:60]:
        same_id = sorted(other["source"] for other in known if other["id"] == row["id"])
        assert ledger.find(row["id"])["source"].to_pylist() == same_id
        assert ledger.find(row["id"][:12])["source"].to_pylist() == same_id
        by_source = sorted(other["id"] for other in known if other["source"] == row["source"])
        assert sorted(ledger.find(row["source"])["id"].to_pylist()) == by_source
    for source in outside["source"].to_pylist():
        assert ledger.find(source)["source"].to_pylist() == [source]
    for missing in ("https://nowhere.example/", "0" * 64, "ffffffff", "short", ""):
        with pytest.raises(DataError, match="no image with id or source"):
            ledger.find(missing)


def test_first_digits_of_several_ids_are_refused(tmp_path):
    ids = ["abcdef00" + "1" * 56, "abcdef00" + "2" * 56]
    table = pool_rows(ids, ["a", "b"])
    write_ledger(LocalStore(tmp_path), TableRows((table,)), LedgerFacts(hex_to_ids(table["id"])), Decisions.of(2))
    with pytest.raises(DataError, match="abcdef00 begins 2 ids; give more digits"):
        open_ledger(LocalStore(tmp_path)).find("abcdef00")


def test_a_look_up_reads_a_small_part_of_a_large_ledger(tmp_path):
    count = 200_000
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 256, (count, 32)).astype(np.uint8)
    table = pool_rows(ids_to_hex(ids).to_pylist(), [f"https://host.example/{number}/image.jpg" for number in range(count)])
    write_ledger(LocalStore(tmp_path), TableRows((table,)), LedgerFacts(ids), Decisions.of(count), rows_per_file=100_000)
    whole = sum(entry.num_bytes for entry in LocalStore(tmp_path).list("ledger"))

    class Counting(LocalStore):
        num_read = 0

        def read_range(self, key, start, num_bytes):
            Counting.num_read += num_bytes
            return super().read_range(key, start, num_bytes)

    ledger = open_ledger(Counting(tmp_path))
    assert ledger.find("https://host.example/77777/image.jpg")["id"].to_pylist() == [table["id"][77777].as_py()]
    assert Counting.num_read < whole / 4


def test_the_bytes_do_not_depend_on_the_order_of_tasks_and_survive_interruptions(tmp_path):
    table, facts, decisions = random_pool(300, seed=3)
    outside = TableRows((outside_rows(40),))
    before = [StageCount("crawl", 340, 300)]

    def backwards(function, tasks, *, label, has_state=False):
        return run_serially(function, list(tasks)[::-1], label=label)

    def contents(folder):
        store = LocalStore(folder)
        return {entry.key: store.read(entry.key) for entry in store.list() if not entry.key.startswith("_work/")}

    one, two, three, four = (LocalStore(tmp_path / name) for name in "1234")
    settings = {"outside": outside, "before": before, "rows_per_file": 32}
    write_ledger(one, split(table, 40), facts, decisions, **settings)
    write_ledger(two, split(table, 40), facts, decisions, run_tasks=backwards, **settings)

    class StopError(Exception):
        pass

    left = 0

    def interrupted(function, tasks, *, label, has_state=False):
        nonlocal left
        for result in run_serially(function, tasks, label=label):
            yield result
            left -= 1
            if left < 0:
                raise StopError

    for budget in range(0, 40, 3):
        left = budget
        try:
            write_ledger(three, split(table, 40), facts, decisions, run_tasks=interrupted, **settings)
        except StopError:
            continue
        break
    assert contents(one.uri) == contents(two.uri) == contents(three.uri)
    write_ledger(four, split(table, 7), facts, decisions, **settings)
    assert contents(four.uri) == contents(two.uri)


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_pool_and_a_single_image_have_a_ledger(tmp_path, count):
    table, files = pool_rows([identity(0)][:count], ["a"][:count]), LocalStore(tmp_path)
    decisions = Decisions.of(count)
    decisions.judge(same_reason("copies", decisions.rows, np.zeros(count, bool), "copy"))
    assert write_ledger(files, TableRows((table,)), LedgerFacts(hex_to_ids(table["id"])), decisions) == [
        FunnelStep("copies", count, count, {})
    ]
    assert sum(part.num_rows for part in open_ledger(files).rows(["id"])) == count


def test_a_row_that_vanishes_or_changes_its_mind_fails_the_funnel(tmp_path):
    table, facts, decisions = random_pool(50, seed=5)
    files = LocalStore(tmp_path)
    write_ledger(files, TableRows((table,)), facts, decisions)
    whole = pq.read_table(tmp_path / "ledger" / "000000.parquet")
    files.put("ledger/000000.parquet", ledger_bytes(whole.filter(pa.compute.not_equal(whole["stage"], "copies"))))
    with pytest.raises(DataError, match="unaccounted for"):
        open_ledger(files).funnel()
    position = whole.schema.get_field_index("stage")
    unheard = pa.array(["unheard" if stage else None for stage in whole["stage"].to_pylist()])
    files.put("ledger/000000.parquet", ledger_bytes(whole.set_column(position, whole.schema.field("stage"), unheard)))
    with pytest.raises(DataError, match="'unheard', which the ledger does not list"):
        open_ledger(files).funnel()


def test_stages_that_do_not_add_up_are_refused():
    check_funnel([FunnelStep("a", 3, 2, {"x": 1}), FunnelStep("b", 2, 2, {})])
    with pytest.raises(DataError, match="'b' got 3 rows, but 'a' kept 2"):
        check_funnel([FunnelStep("a", 3, 2, {"x": 1}), FunnelStep("b", 3, 3, {})])
    decisions = Decisions.of(4)
    decisions.judge(same_reason("a", decisions.rows, np.array([1, 0, 0, 0], bool), "x"))
    with pytest.raises(DataError, match="stage 'b' judged 4 images, the stages before it kept 3"):
        decisions.judge(same_reason("b", np.arange(4), np.zeros(4, bool), "y"))


def test_reasons_come_out_of_a_column_of_texts():
    verdicts = named_reasons("decode", np.arange(4), pa.array(["", "truncated", None, "too_large"]))
    assert verdicts.dropped.tolist() == [False, True, False, True]
    decisions = Decisions.of(4)
    decisions.judge(verdicts)
    assert [decisions.causes[cause] for cause in decisions.cause] == [
        ("", ""), ("decode", "truncated"), ("", ""), ("decode", "too_large"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="300 reasons, the limit is 255"):
        named_reasons("decode", np.arange(300), pa.array([str(number) for number in range(300)]))


def test_arrays_of_another_length_and_rows_without_a_reason_are_refused(tmp_path):
    table, facts, _ = random_pool(10, seed=6)
    with pytest.raises(DataError, match="similarity has 3 entries for 10 images"):
        LedgerFacts(facts.ids, similarity=np.zeros(3, np.float32))
    with pytest.raises(DataError, match="10 rows, 10 ids and 9 decisions"):
        write_ledger(LocalStore(tmp_path), TableRows((table,)), facts, Decisions.of(9))
    nothing = TableRows((pa.table({"source": ["x"], "stage": ["crawl"]}),))
    with pytest.raises(DataError, match="need a column 'reason'"):
        write_ledger(LocalStore(tmp_path / "b"), TableRows((table,)), facts, Decisions.of(10), outside=nothing)
    with pytest.raises(DataError, match="has no ledger"):
        open_ledger(LocalStore(tmp_path / "c"))
    LocalStore(tmp_path).put(LEDGER_INDEX, b"{}")
    with pytest.raises(DataError, match="is not the index of a ledger"):
        open_ledger(LocalStore(tmp_path))


def test_ids_survive_the_way_to_text_and_back():
    texts = [identity(number) for number in range(100)]
    ids = hex_to_ids(pa.chunked_array([texts[:40], texts[40:]]))
    assert [bytes(row).hex() for row in ids] == texts == ids_to_hex(ids).to_pylist()
    assert ids_to_hex(ids, np.array([5, -1])).to_pylist() == [texts[5], None]
    for bad in ("abc", "Z" * 64, None):
        with pytest.raises(DataError):
            hex_to_ids(pa.array([bad], pa.string()))


def test_the_vectorised_hash_is_that_of_a_loop_over_characters():
    def slow(text: str) -> int:
        total = sum((byte + 1) * pow(0x9E3779B97F4A7C15, place, 2**64) for place, byte in enumerate(text.encode())) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            total = (total ^ total >> shift) * factor % 2**64
        return total ^ total >> 31

    texts = ["", "a", "ab", "ba", "é", "https://example.org/" + "x" * 3000, "\0", "\0\0", "a"]
    column = pa.chunked_array([pa.array(["skipped", *texts[:4]]).slice(1), pa.array(texts[4:])])
    assert hash_strings(column).tolist() == [slow(text) for text in texts]
    assert len(hash_strings(pa.array([], pa.string()))) == 0


def test_the_rendered_funnel_is_aligned_and_ends_with_what_was_kept(tmp_path):
    lines = render_funnel([FunnelStep("decode", 6, 5, {"truncated": 1}), FunnelStep("copies", 5, 2, {"copy": 3})]).splitlines()
    assert lines[0].split() == ["stage", "rows", "in", "rows", "kept", "dropped", "reason"]
    assert lines[-1].split() == ["kept", "2", "4"]
    assert lines[1].index("truncated") == lines[2].index("copy")
