"""Ledger, funnel, explanations."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.curation.ledger import (
    SCHEMA,
    FunnelStep,
    Verdicts,
    build_ledger,
    check_funnel,
    explain,
    funnel,
    same_reason,
    spread,
)
from heliostat.curation.report import copy_report, render_funnel
from heliostat.errors import DataError


def manifest(sources: list[str], ids: list[str] | None = None) -> pa.Table:
    count = len(sources)
    return pa.table(
        {
            "id": ids or [f"{position:02d}" * 32 for position in range(count)],
            "source": sources,
            "label": pa.nulls(count, pa.string()),
            "width": pa.array([64] * count, pa.int32()),
            "height": pa.array([48] * count, pa.int32()),
            "format": ["png"] * count,
            "length": pa.array([1000] * count, pa.int64()),
        }
    )


REJECTED = pa.table({"source": ["broken.png"], "reason": ["truncated"], "detail": ["ends after 300 bytes"]})


def two_stages() -> list[Verdicts]:
    first = same_reason("exact", np.arange(5), np.array([0, 1, 0, 0, 0], bool), "exact_duplicate")
    reasons = np.array(["", "not_retrieved", "over_max_images", ""])
    return [first, Verdicts("retrieval", first.kept_rows, reasons != "", reasons)]


def ledger() -> pa.Table:
    facts = {"cluster": spread(pa.array([7, 8]), np.array([0, 4]), 5)}
    return build_ledger(manifest(list("abcde")), REJECTED, two_stages(), facts)


def test_every_file_ever_seen_has_a_row_with_its_decision_stage_and_reason():
    table = ledger()
    assert table.schema.names == SCHEMA.names
    assert table["source"].to_pylist() == ["a", "b", "c", "d", "e", "broken.png"]
    assert table["decision"].to_pylist() == ["kept", "dropped", "dropped", "dropped", "kept", "dropped"]
    assert table["stage"].to_pylist() == [None, "exact", "retrieval", "retrieval", None, "decode"]
    assert table["reason"].to_pylist() == [
        None, "exact_duplicate", "not_retrieved", "over_max_images", None, "truncated",
    ]  # fmt: skip
    assert table["cluster"].to_pylist() == [7, None, None, None, 8, None]
    assert table["bytes"].to_pylist() == [1000] * 5 + [None]


def test_the_funnel_adds_up_and_survives_a_parquet_file(tmp_path):
    expected = [
        FunnelStep("decode", 6, 5, {"truncated": 1}),
        FunnelStep("exact", 5, 4, {"exact_duplicate": 1}),
        FunnelStep("retrieval", 4, 2, {"not_retrieved": 1, "over_max_images": 1}),
    ]
    assert funnel(ledger()) == expected
    pq.write_table(ledger(), tmp_path / "ledger.parquet")
    assert funnel(pq.read_table(tmp_path / "ledger.parquet")) == expected


def test_a_row_that_disappears_or_changes_its_mind_fails_the_funnel():
    table = ledger()
    with pytest.raises(DataError, match="1 are unaccounted for"):
        funnel(table.slice(2))
    position = table.schema.get_field_index("stage")
    stages = table["stage"].to_pylist()
    stages[1] = None
    with pytest.raises(DataError, match="'exact': 5 rows in, 4 kept and 0 dropped"):
        funnel(table.set_column(position, SCHEMA.field("stage"), pa.array(stages)))
    stages[1] = "unheard"
    with pytest.raises(DataError, match="'unheard', which the ledger does not list"):
        funnel(table.set_column(position, SCHEMA.field("stage"), pa.array(stages)))


def test_a_stage_that_gets_other_rows_than_the_one_before_kept_fails_the_check():
    check_funnel([FunnelStep("a", 3, 2, {"x": 1}), FunnelStep("b", 2, 2, {})])
    with pytest.raises(DataError, match="'b' got 3 rows, but 'a' kept 2"):
        check_funnel([FunnelStep("a", 3, 2, {"x": 1}), FunnelStep("b", 3, 3, {})])


def test_a_table_that_is_no_ledger_has_no_funnel():
    with pytest.raises(DataError, match="does not name its stages"):
        funnel(ledger().replace_schema_metadata(None))


def test_a_source_that_is_in_the_manifest_twice_is_refused():
    with pytest.raises(DataError, match="source 'a' is in the manifest twice"):
        build_ledger(manifest(["a", "a"]), REJECTED, [], {})


def test_explain_finds_an_image_by_source_id_or_prefix_and_tells_its_story():
    table = ledger()
    assert explain(table, "broken.png") == ["broken.png could not be decoded: truncated (ends after 300 bytes)."]
    by_source = explain(table, "e")
    assert by_source[0] == "e is image 040404040404: 64 x 48 png, 1000 bytes."
    assert by_source[-2:] == ["It lies in cluster 8.", "It was kept."]
    assert explain(table, "04" * 32) == explain(table, "04" * 4) == by_source
    assert explain(table, "d")[-1] == "It was dropped by stage retrieval: over_max_images."
    assert "same bytes" in explain(table, "b")[1]
    with pytest.raises(DataError, match="no image with id or source 'zz'"):
        explain(table, "zz")


def test_a_prefix_of_several_ids_is_refused():
    table = build_ledger(manifest(["a", "b"], ["abcdef0011", "abcdef0022"]), REJECTED, [], {})
    with pytest.raises(DataError, match="begins 2 ids"):
        explain(table, "abcdef00")


def test_the_rendered_funnel_is_aligned_and_ends_with_what_was_kept():
    lines = render_funnel(funnel(ledger())).splitlines()
    assert lines[0].split() == ["stage", "rows", "in", "rows", "kept", "dropped", "reason"]
    assert lines[-1].split() == ["kept", "2", "4"]
    assert [line.split() for line in lines[3:5]] == [
        ["retrieval", "4", "2", "1", "not_retrieved"],
        ["1", "over_max_images"],
    ]
    assert len({line.index(reason) for line, reason in zip(lines[1:3], ["truncated", "exact_dup"], strict=True)}) == 1


def test_the_copy_report_counts_found_copies_and_wrong_drops_by_kind():
    names = ["original", "flip", "jpeg", "stranger", "twin", "frame1", "frame2"]
    ids = ["id0", "id1", "id2", "id3", "id0", "id5", "id6"]
    exact = same_reason("exact", np.arange(7), np.array([0, 0, 0, 0, 1, 0, 0], bool), "exact_duplicate")
    dropped = np.array([name in ("flip", "stranger", "frame2") for name in names])[exact.kept_rows]
    facts = {
        "component": pa.array([0, 0, 1, 0, 0, 2, 2]),
        "representative": pa.array(["id0", "id0", "id2", "id0", "id0", "id5", "id5"]),
    }
    table = build_ledger(
        manifest(names, ids), REJECTED, [exact, same_reason("copies", exact.kept_rows, dropped, "copy")], facts
    )
    truth = {"flip": "original", "jpeg": "original", "twin": "original"}
    score = copy_report(table, truth, kinds={"flip": "flip", "jpeg": "jpeg", "twin": "exact"}, same=[["frame1", "frame2"]])
    assert (score.num_planted, score.num_found, score.num_dropped) == (3, 2, 4)
    assert score.recall_by_kind == {"exact": 1.0, "flip": 1.0, "jpeg": 0.0}
    assert score.wrongly_dropped == ("stranger",)
    assert score.precision == pytest.approx(0.75)
    assert copy_report(table, truth).wrongly_dropped == ("frame2", "stranger")
    with pytest.raises(DataError, match="'elsewhere' of the truth is not in the ledger"):
        copy_report(table, {"elsewhere": "original"})
