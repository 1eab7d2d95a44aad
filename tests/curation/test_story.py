"""The story of an image: sentences for every stage, also for what never became an image."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from heliostat.curation.ledger import SCHEMA, Decisions, StageCount, same_reason
from heliostat.curation.ledger_facts import LedgerFacts, hex_to_ids
from heliostat.curation.ledger_read import open_ledger
from heliostat.curation.ledger_write import TableRows, write_ledger
from heliostat.curation.story import explain, tell
from heliostat.storage import LocalStore

SETTINGS = {"dup_threshold": 0.6, "decontamination_threshold": 0.45, "max_nsfw_score": 0.5}


def row(**known: Any) -> dict[str, Any]:
    plain = {
        "id": "ab" * 32,
        "source": "https://a.example/x.jpg",
        "width": 640,
        "height": 480,
        "format": "jpeg",
        "length": 1234,
    }
    return dict.fromkeys(SCHEMA.names) | plain | {"decision": "kept"} | known


def test_a_kept_image_tells_what_every_stage_saw():
    story = tell(
        row(
            label="dog", page="https://a.example/", alt="a dog", http_status=200, robots="allowed", licence="CC-BY",
            nsfw=0.1, num_faces=2, faces_blurred=True, nearest_copy="cd" * 32, similarity=0.55, component=7, component_size=3,
            representative="ab" * 32, similarity_to_representative=1.0, nearest_reference="ef" * 32, evaluation_set="val",
            similarity_to_reference=0.3, cluster_levels=[5, 2],
            retrieved_by=[
                {"set": "pets", "mode": "sample", "curated_id": "11" * 32, "rank": 1, "similarity": 0.9},
                {"set": "pets", "mode": "sample", "curated_id": "22" * 32, "rank": 2, "similarity": 0.8},
                {"set": "birds", "mode": "cluster", "curated_id": None, "rank": None, "similarity": None},
            ],
        ),
        SETTINGS,
    )  # fmt: skip
    assert story == [
        "https://a.example/x.jpg is image abababababab: 640 x 480 jpeg, 1234 bytes, label dog.",
        "It was found on https://a.example/, beside the text 'a dog'.",
        "The server answered 200, robots.txt said allowed, the page declares the licence CC-BY.",
        "Its NSFW score is 0.100, not above the threshold 0.5.",
        "2 faces were found in it and blurred.",
        "The nearest other image is cdcdcdcdcdcd, similarity 0.550, not above the threshold 0.6.",
        "It represents component 7, which holds 2 copies of it.",
        "The nearest evaluation image of val is efefefefefef, similarity 0.300, not above the threshold 0.45.",
        "Image 111111111111 of set pets retrieved it at rank 1, similarity 0.900, and 1 other curated image of it did too "
        "(sample mode).",
        "Set birds brought it in through a matched cluster (cluster mode).",
        "It lies in cluster 5, below 2.",
        "It was kept.",
    ]


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (
            {"stage": "exact", "reason": "exact_duplicate", "duplicate_of": "ab" * 32, "hash_distance": 0.0},
            ["It has the same bytes as another file", "It was dropped by stage exact: exact_duplicate (another file has"],
        ),
        (
            {"stage": "hash", "reason": "hash_copy", "duplicate_of": "cd" * 32, "hash_distance": 12.5},
            ["By its hash it is the picture of image cdcdcdcdcdcd, 12.5 apart.", "stage hash: hash_copy"],
        ),
        (
            {
                "stage": "copies",
                "reason": "copy",
                "component": 3,
                "component_size": 9,
                "representative": "cd" * 32,
                "similarity_to_representative": 0.71,
            },
            ["Component 3 (9 images) is represented by cdcdcdcdcdcd instead, similarity 0.710.", "a better copy"],
        ),
        (
            {"stage": "hash", "reason": "hash_copy", "component": 3, "component_size": 9, "representative": "cd" * 32},
            ["Component 3 (9 images) is represented by cdcdcdcdcdcd instead.", "stage hash: hash_copy"],
        ),
        ({"stage": "nsfw", "reason": "above_nsfw_threshold", "nsfw": 0.9}, ["score is 0.900, above the threshold 0.5", "nsfw"]),
        (
            {"stage": "decode", "reason": "truncated", "detail": "ends early"},
            ["stage decode: truncated. In its own words: ends"],
        ),
        ({"stage": "retrieval", "reason": "not_retrieved", "retrieved_by": []}, ["no curated image has it among its nearest"]),
        (
            {"stage": "balance", "reason": "over_cluster_level", "cluster_levels": [4]},
            ["It lies in cluster 4.", "balance drew"],
        ),
        ({"stage": "strange", "reason": "new_reason"}, ["It was dropped by stage strange: new_reason."]),
    ],
)
def test_every_stage_says_why_it_dropped_an_image(known, expected):
    text = "\n".join(tell(row(decision="dropped", **known), SETTINGS))
    for part in expected:
        assert part in text


def test_what_never_became_an_image_and_what_was_forgotten_have_stories_too():
    gone = row(id=None, decision="dropped", stage="crawl", reason="robots", http_status=None, detail="disallowed by rule 3")
    assert tell(gone, {}) == [
        "https://a.example/x.jpg never became an image.",
        "It was dropped by stage crawl: robots (robots.txt of its host disallows it). In its own words: disallowed by rule 3.",
    ]
    assert tell(row(decision="forgotten", source=None), {}) == [
        "Image abababababab was forgotten: somebody asked for it, and nothing but its id is left."
    ]


def test_sentences_come_without_thresholds_when_none_were_in_force():
    text = "\n".join(tell(row(nsfw=0.9, nearest_copy="cd" * 32, similarity=0.9), {}))
    assert "threshold" not in text
    assert "similarity 0.900." in text


def test_why_finds_all_files_of_an_image_and_lost_urls_in_a_written_ledger(tmp_path):
    table = pa.table(
        {
            "id": ["ab" * 32, "ab" * 32, "cd" * 32],
            "source": ["b.png", "a.png", "c.png"],
            "width": pa.array([10] * 3, pa.int32()),
            "height": pa.array([10] * 3, pa.int32()),
            "format": ["png"] * 3,
            "length": pa.array([9] * 3),
        }
    )
    decisions = Decisions.of(3)
    decisions.judge(same_reason("exact", decisions.rows, np.array([True, False, False]), "exact_duplicate"))
    facts = LedgerFacts(hex_to_ids(table["id"]), duplicate_of=np.array([1, -1, -1]))
    lost = pa.table({"source": ["https://x.example/"], "stage": ["crawl"], "reason": ["dns"]})
    write_ledger(
        LocalStore(tmp_path), TableRows((table,)), facts, decisions,
        outside=TableRows((lost,)), before=[StageCount("crawl", 4, 3)], settings=SETTINGS,
    )  # fmt: skip
    ledger = open_ledger(LocalStore(tmp_path))
    story = explain(ledger, "abababab")
    assert [sentence for sentence in story if "is image" in sentence] == [
        "a.png is image abababababab: 10 x 10 png, 9 bytes.",
        "b.png is image abababababab: 10 x 10 png, 9 bytes.",
    ]
    assert story[-1].startswith("It was dropped by stage exact")
    assert explain(ledger, "https://x.example/") == [
        "https://x.example/ never became an image.",
        "It was dropped by stage crawl: dns.",
    ]
