"""`why` and `what-if` over the curations of a store: which one is asked, what they say, and how they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_features import DIMENSION, made_features, near

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore
from heliostat.crawling.reasons import REASONS
from heliostat.crawling.tables import LINKS_SCHEMA, links_key, table_to_bytes, text_table
from heliostat.curation.config import DedupConfig
from heliostat.curation.copies_rows import COPIES_JSON
from heliostat.curation.dedup import DedupInputs, Deduplicated, dedup
from heliostat.curation.forget_list import read_forget_list
from heliostat.curation.ledger_facts import LedgerFacts
from heliostat.curation.ledger_write import write_ledger
from heliostat.curation.pool import Pool, read_columns
from heliostat.curation.tasks import run_serially
from heliostat.errors import ArtifactError, ArtifactNotFoundError, DataError, StorageError, UsageError
from heliostat.runtime.ledger_rows import PoolRows
from heliostat.runtime.review_verbs import curations, spellings, what_would_be, why
from heliostat.storage import LocalStore

SIMILARITIES = (0.95, 0.9, 0.8, 0.7, 0.65, 0.55, 0.5)
"""Of the copies that lie in every pool, one each, to images that are unlike each other."""


def commit(artifacts: ArtifactStore, name: str, files: dict[str, bytes], inputs: dict[str, Artifact]) -> Artifact:
    draft = artifacts.begin(ArtifactRef.parse(name), config={}, inputs=inputs, notify=print)
    for key, data in files.items():
        draft.put(key, data)
    return draft.commit(counts={})


def pool_of(folder: Path, name: str) -> Pool:
    """Twelve images, and copies of the first seven. Names and ids are of this pool alone."""
    base = np.linalg.qr(np.random.default_rng(3).standard_normal((DIMENSION, DIMENSION)))[0][:12]
    copies = np.concatenate([near(base[row : row + 1], value, row) for row, value in enumerate(SIMILARITIES)])
    return Pool((made_features(LocalStore(folder / name), np.concatenate([base, copies]), name=f"features/{name}@1"),))


def judge(folder: Path, pool: Pool, **settings: object) -> Deduplicated:
    files = LocalStore(folder)
    given = DedupInputs(pool, {}, read_forget_list(files))
    config = DedupConfig.model_validate(settings)
    return dedup(given, config, files=files, work=files.child("_work"), run=run_serially)


def curate(artifacts: ArtifactStore, folder: Path, name: str, **settings: object) -> Pool:
    """copies/NAME@1 and curated/NAME@1 of a pool of its own, with the ledger of what dedup decided."""
    pool = pool_of(folder, name)
    found = judge(folder / f"{name}-dedup", pool, **settings)
    edges = {
        entry.key: LocalStore(folder / f"{name}-dedup").read(entry.key)
        for entry in LocalStore(folder / f"{name}-dedup").list("edges/")
    }
    facts = json.dumps(
        {"causes": [], "counts": [], "settings": {}, "evaluation_sets": [], "statistics": dict(found.statistics)}
    ).encode()
    copies = commit(artifacts, f"copies/{name}@1", {COPIES_JSON: facts, **edges}, {})
    ledger, rows = LocalStore(folder / f"{name}-ledger"), found.rows
    told = LedgerFacts(
        read_columns(pool).ids,
        nearest=rows.nearest,
        similarity=rows.similarity,
        component=rows.component,
        representative=rows.representative,
        similarity_to_representative=rows.similarity_to_representative,
    )
    write_ledger(ledger, PoolRows(pool, (None,)), told, found.decisions, settings=found.settings)
    files = {entry.key: ledger.read(entry.key) for entry in ledger.list() if not entry.key.startswith("_work/")}
    commit(artifacts, f"curated/{name}@1", files, {"copies": copies})
    return pool


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, dict[str, Pool]]:
    """A store with two curations and the refused links of a crawl."""
    folder = tmp_path_factory.mktemp("review")
    artifacts = ArtifactStore(LocalStore(folder / "store"))
    pools = {name: curate(artifacts, folder, name) for name in ("one", "two")}
    links = [
        ["https://a.example/1.svg", "https://p.example/", "a", None, "", "blocked_suffix"],
        ["https://a.example/2.png", "", "", None, "noai", ""],
        ["http://A.example:8080/c d.pdf", "https://p.example/", "a", None, "", "port"],
        ["https://a.example/3.png", "", "", None, "", ""],
    ]
    commit(artifacts, "raw/web@1", {f"crawl/{links_key(0)}": table_to_bytes(text_table(links, LINKS_SCHEMA))}, {})
    return artifacts, pools


def identity(pool: Pool, row: int) -> str:
    return str(pool.columns_at(np.array([row]), ["id"])["id"][0].as_py())


def test_every_curation_is_asked_unless_one_is_named_and_only_those_that_know_the_image_answer(store) -> None:
    artifacts, pools = store
    asked = identity(pools["one"], 11)
    named = why(artifacts, "curated/one@1", asked)
    assert named[0].startswith("features/one@1/00011.png is image ")
    assert named[-1] == "It was kept."
    assert why(artifacts, "", asked) == ["curated/one@1:", *named]
    assert why(artifacts, "", "features/one@1/00011.png") == ["curated/one@1:", *named]
    with pytest.raises(DataError, match=r"no image with id or source .* among the 19 rows of this ledger"):
        why(artifacts, "curated/two@1", asked)


def test_the_first_digits_of_an_id_will_do_and_too_few_are_not_taken_for_one(store) -> None:
    artifacts, pools = store
    whole = identity(pools["two"], 4)
    assert why(artifacts, "", whole[:8]) == why(artifacts, "", whole)
    assert why(artifacts, "", whole.upper()) == why(artifacts, "", whole)
    for text in (whole[:7], whole[:-1] + "g"):
        with pytest.raises(DataError) as error:
            why(artifacts, "", text)
        assert str(error.value).startswith(f"no image with id or source '{text}' in ")
        assert "curated/one@1" in str(error.value)
        assert "curated/two@1" in str(error.value)


def test_a_copy_names_the_image_that_stays_for_it(store) -> None:
    artifacts, pools = store
    ids = [identity(pools["one"], row) for row in (0, 12)]
    stories = ["\n".join(why(artifacts, "curated/one@1", one)) for one in ids]
    (dropped,) = [number for number, story in enumerate(stories) if "It was dropped by stage copies: copy" in story]
    assert f"represented by {ids[1 - dropped][:12]} instead, similarity 0.9" in stories[dropped]


@pytest.mark.parametrize("name", ["", "curated/one@1"])
@pytest.mark.parametrize(
    ("url", "story"),
    [
        (
            "https://a.example/1.svg",
            "https://a.example/1.svg was found by the crawl raw/web@1 on https://p.example/ and never fetched: blocked_suffix "
            "(its path ends in one of crawl.filter.blocked_suffixes).",
        ),
        (
            "https://a.example/2.png",
            "https://a.example/2.png was found by the crawl raw/web@1 and never fetched: opt_out "
            "(another page opts out of its use).",
        ),
        (
            "http://A.example:8080/c d.pdf",
            "http://A.example:8080/c d.pdf was found by the crawl raw/web@1 on https://p.example/ and never fetched: port "
            f"({REASONS['port'].meaning}).",
        ),
    ],
)
def test_a_link_that_was_refused_has_its_story_though_no_ledger_holds_it(store, name: str, url: str, story: str) -> None:
    assert why(store[0], name, url) == [story]


def test_a_url_that_nobody_found_is_refused_as_any_other_name(store) -> None:
    with pytest.raises(DataError, match=r"no image with id or source 'https://nobody\.example/x\.png' in curated/"):
        why(store[0], "", "https://nobody.example/x.png")


def test_only_curated_artifacts_can_be_asked(store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"copies/one@1 is not a curated artifact; only curation keeps a ledger"):
        curations(store[0], "copies/one@1")
    with pytest.raises(UsageError, match=r"'one' is not an artifact; write kind/name@version"):
        curations(store[0], "one")
    with pytest.raises(ArtifactNotFoundError, match="curated/three@1"):
        curations(store[0], "curated/three@1")
    with pytest.raises(ArtifactNotFoundError, match=r"no curated artifact in .*; heliostat curate makes one, or give store="):
        curations(ArtifactStore(LocalStore(tmp_path)), "")
    assert {str(one.ref) for one in curations(store[0], "")} == {"curated/one@1", "curated/two@1"}


@pytest.mark.parametrize("threshold", [0.52, 0.68, 0.85])
def test_what_would_have_been_is_what_dedup_does_at_that_threshold(store, tmp_path: Path, threshold: float) -> None:
    artifacts, pools = store
    lines = what_would_be(artifacts, "curated/one@1", [f"dup_threshold={threshold}"])
    assert lines[0] == "curated/one@1, from the edges of copies/one@1:"
    (left,) = [line.split()[1:] for line in lines if line.startswith("left ")]
    # No edge of the graph joins two copies, so every copy above the threshold goes.
    assert left == ["14", str(19 - sum(similarity > threshold for similarity in SIMILARITIES))]
    again = judge(tmp_path / "again", pools["one"], copies={"threshold": threshold})
    assert len(again.decisions.rows) == int(left[1])


def test_a_range_is_a_table_and_the_newest_curation_is_asked_without_a_name(store) -> None:
    artifacts, _ = store
    lines = what_would_be(artifacts, "", ["dup_threshold=0.5..0.8"])
    assert (
        lines[0]
        == f"{curations(artifacts, '')[0].ref}, from the edges of {curations(artifacts, '')[0].record.inputs['copies']}:"
    )
    assert len(lines) == 1 + 1 + 1 + 7  # name, head, as it was, seven thresholds
    assert len(what_would_be(artifacts, "", [])) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["treshold=0.7"], "what-if knows no treshold; ask about dup_threshold, "),
        (
            ["dup_threshold=0.3"],
            "dup_threshold=0.3 is below 0.45, where stored similarities begin; dedup with a lower edge_floor",
        ),
        (["dup_threshold=high"], "'dup_threshold=high' is not key=number or key=low..high with numbers from -1 to 1"),
        (["dup_threshold=0.5..0.7", "max_nsfw_score=0.1..0.5"], "only one key can have a range"),
        (["decontamination_threshold=0.7"], "decontamination_threshold was not in force here"),
    ],
)
def test_a_question_that_what_is_stored_cannot_answer_is_refused(store, words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        what_would_be(store[0], "curated/one@1", words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_without_edges_nothing_can_be_asked(tmp_path: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    curate(artifacts, tmp_path, "plain", copies={"enabled": False})
    with pytest.raises(UsageError, match=r"copies/plain@1 has no edges: copies were not looked for \(dedup.copies.enabled"):
        what_would_be(artifacts, "", ["dup_threshold=0.7"])


def test_edges_that_are_gone_and_facts_that_are_damaged_are_named(tmp_path: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    curate(artifacts, tmp_path, "one")
    files = artifacts.files(ArtifactRef.parse("copies/one@1"))
    key = next(entry.key for entry in files.list("edges/"))
    data = files.read(key)
    files.delete(key)
    with pytest.raises(ArtifactError, match=f"copies/one@1: {key} is gone; restore the file, or remove the folder"):
        what_would_be(artifacts, "", ["dup_threshold=0.8"])
    files.put(key, data)
    for damaged in (b"[]", b"{", b'{"statistics": 3}'):
        files.put(COPIES_JSON, damaged)
        with pytest.raises(StorageError, match=r"copies.json is damaged .*; restore it, or remove the folder"):
            what_would_be(artifacts, "", ["dup_threshold=0.8"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["foo=3"], "what-if knows no foo; ask about dup_threshold, decontamination_threshold, max_nsfw_score, min_sim"),
        (["dup_threshold=0.7", "dup_threshold=0.8"], "dup_threshold is given twice; give it once, or as a range"),
        (["dup_threshold=2"], "'dup_threshold=2' is not key=number"),
    ],
)
def test_a_question_that_cannot_be_meant_is_refused(store, words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        what_would_be(store[0], "", words)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("HTTP://Example.ORG:80/a b.jpg#x", ["source:http://example.org/a%20b.jpg", "source:HTTP://Example.ORG:80/a b.jpg#x"]),
        ("http://example.org/a.jpg", ["source:http://example.org/a.jpg"]),
        ("müller.de", ["domain:xn--mller-kva.de", "domain:müller.de"]),
        ("Example.ORG", ["domain:example.org"]),
        ("domain:under_score.org", ["domain:under_score.org"]),
        ("ABCDEF01", ["id:abcdef01"]),
        ("folder/Photo.JPG", ["source:folder/Photo.JPG"]),
    ],
)
def test_a_request_to_forget_is_spelled_as_the_store_may_have_it(target: str, expected: list[str]) -> None:
    assert spellings(target) == expected
