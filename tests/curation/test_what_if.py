"""what-if: from stored edges, exactly what a run at another threshold would do."""

import numpy as np
import pyarrow as pa
import pytest

from heliostat.curation.copies import components_at
from heliostat.curation.copies_config import CopyLimits
from heliostat.curation.edges import Edges, edges_key, make_edges, write_edges
from heliostat.curation.ledger import Decisions, same_reason
from heliostat.curation.ledger_facts import LedgerFacts, ids_to_hex
from heliostat.curation.ledger_read import open_ledger
from heliostat.curation.ledger_write import TableRows, write_ledger
from heliostat.curation.pool_facts import read_edges_above, read_pool_facts
from heliostat.curation.settle import similarities_of_edges
from heliostat.curation.what_if import outcome, parse_overrides, sweep_lines, what_if
from heliostat.errors import DataError, UsageError
from heliostat.storage import LocalStore

FLOOR = 0.45


def groups_of_copies(count: int, seed: int) -> np.ndarray:
    """Vectors in groups whose similarities spread from 0.4 to 1, chains included."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(count // 5, 16))
    noise = draw.normal(size=(count, 16)) * draw.uniform(0.05, 1.1, (count, 1))
    vectors = centres[draw.integers(0, len(centres), count)] + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def all_edges(vectors: np.ndarray) -> Edges:
    similarity = vectors @ vectors.T
    first, second = np.nonzero(np.triu(similarity >= FLOOR, 1))
    return make_edges(first, second, similarity[first, second])


def slow_run(edges, rank, settings, *, nsfw, reference):
    """(representative by row, rows left): a loop over single images and pairs."""
    similarity = {(int(a), int(b)): float(s) for a, b, s in zip(*edges, strict=True)}
    alive = [row for row in range(len(nsfw)) if not nsfw[row] > settings["max_nsfw_score"]]
    representative = {row: row for row in alive}
    waiting = set(alive)
    pairs = [
        pair for pair, value in similarity.items() if value > np.float32(settings["dup_threshold"]) and set(pair) <= waiting
    ]
    while pairs:
        near = {}
        for first, second in pairs:
            near.setdefault(first, set()).add(second)
            near.setdefault(second, set()).add(first)
        left, seen = set(), set()
        for start in sorted(near):
            if start in seen:
                continue
            component, stack = set(), [start]
            while stack:
                row = stack.pop()
                if row not in component:
                    component.add(row)
                    stack += near[row]
            seen |= component
            best = min(component, key=lambda row: rank[row])
            for row in component:
                value = similarity.get((min(row, best), max(row, best)), -1.0)
                if row == best or value >= np.float32(settings["min_similarity_to_representative"]):
                    representative[row] = best
                else:
                    left.add(row)
        pairs = [pair for pair in pairs if set(pair) <= left]
    limit = np.float32(settings["decontamination_threshold"])
    touched = {representative[row] for row in alive if reference[row] > limit}
    return representative, {row for row in alive if representative[row] == row and row not in touched}


def make_ledger(folder, count=150, seed=0):
    """A ledger of a whole run at 0.6, written from what the slow run says."""
    draw = np.random.default_rng(seed)
    vectors, ids = groups_of_copies(count, seed), draw.integers(0, 256, (count, 32)).astype(np.uint8)
    edges = all_edges(vectors)
    width = draw.integers(100, 400, count)
    table = pa.table(
        {
            "id": ids_to_hex(ids),
            "source": [f"{row}.png" for row in range(count)],
            "width": pa.array(width, pa.int32()),
            "height": pa.array([100] * count, pa.int32()),
            "length": pa.array(draw.integers(1000, 1005, count)),
            "format": [("png", "jpeg")[row % 2] for row in range(count)],
            "nsfw": pa.array(draw.random(count), pa.float32()),
        }
    )
    order = sorted(
        range(count),
        key=lambda row: (-width[row], table["format"][row].as_py() == "jpeg", -table["length"][row].as_py(), bytes(ids[row])),
    )
    rank = {row: place for place, row in enumerate(order)}
    reference = draw.uniform(0.2, 0.6, count).astype(np.float32)
    settings = {
        "dup_threshold": 0.6,
        "decontamination_threshold": 0.55,
        "max_nsfw_score": 0.9,
        "min_similarity_to_representative": 0.5,
    }
    nsfw = table["nsfw"].to_numpy()
    representative, left = slow_run(edges, rank, settings, nsfw=nsfw, reference=reference)
    decisions = Decisions.of(count)
    decisions.judge(same_reason("nsfw", decisions.rows, nsfw > np.float32(0.9), "above_nsfw_threshold"))
    rows = decisions.rows
    decisions.judge(same_reason("copies", rows, np.array([representative[row] != row for row in rows]), "copy"))
    rows = decisions.rows
    decisions.judge(same_reason("decontaminate", rows, np.array([row not in left for row in rows]), "shows_evaluation_image"))
    facts = LedgerFacts(
        ids,
        reference=np.zeros(count, np.int64),
        similarity_to_reference=reference,
        reference_ids=np.zeros((1, 32), np.uint8),
    )
    write_ledger(LocalStore(folder), TableRows((table,)), facts, decisions, settings=settings, rows_per_file=40)
    return open_ledger(LocalStore(folder)), edges, (vectors, rank, settings, nsfw, reference)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"dup_threshold": 0.46},
        {"dup_threshold": 0.7},
        {"dup_threshold": 0.9},
        {"decontamination_threshold": 0.5},
        {"max_nsfw_score": 0.6},
        {"min_similarity_to_representative": 0.8, "dup_threshold": 0.5},
        {"dup_threshold": 0.65, "max_nsfw_score": 0.5, "decontamination_threshold": 0.48},
    ],
)
def test_another_threshold_gives_what_a_run_at_it_gives(tmp_path, overrides, seed):
    ledger, edges, (_, rank, settings, nsfw, reference) = make_ledger(tmp_path, seed=seed)
    facts = read_pool_facts(ledger)
    assert facts.rank.tolist() == [rank[row] for row in range(len(rank))]
    found = what_if(facts, edges, overrides, edge_floor=FLOOR)
    new = {**settings, **overrides}
    representative, left = slow_run(edges, rank, new, nsfw=nsfw, reference=reference)
    told = found.now.representative.tolist()
    assert {row: best for row, best in enumerate(told) if best >= 0} == representative
    assert found.now.num_left == len(left)
    assert found.now.dropped["copies"] == sum(best != row for row, best in representative.items())
    assert found.now.num_components == len(set(representative.values()))
    assert found.recorded == found.then.dropped
    _, before = slow_run(edges, rank, settings, nsfw=nsfw, reference=reference)
    assert (found.num_now_kept, found.num_now_dropped) == (len(left - before), len(before - left))
    assert not any("caution" in line for line in found.lines())


def test_the_copies_stage_itself_agrees_at_every_threshold(tmp_path):
    ledger, edges, (_, _, settings, nsfw, _) = make_ledger(tmp_path / "ledger")
    facts = read_pool_facts(ledger)
    present = ~(nsfw > np.float32(settings["max_nsfw_score"]))
    inside = present[edges.first] & present[edges.second]
    write_edges(LocalStore(tmp_path), edges_key("edges/", 0), Edges(*(column[inside] for column in edges)))
    for threshold in (0.45, 0.55, 0.6, 0.75):
        limits = CopyLimits(threshold, settings["min_similarity_to_representative"], 0.45)
        whole = components_at((LocalStore(tmp_path), "edges/"), facts.rank, limits, edge_floor=FLOOR, present=present)
        told = what_if(facts, edges, {"dup_threshold": threshold}, edge_floor=FLOOR).now.representative
        assert told[present].tolist() == whole.representative[present].tolist()


def test_pairs_that_change_sides_are_those_between_the_thresholds_nearest_first(tmp_path):
    ledger, edges, _ = make_ledger(tmp_path)
    facts = read_pool_facts(ledger)
    found = what_if(facts, edges, {"dup_threshold": 0.7}, edge_floor=FLOOR)
    between = [value for value in edges.similarity.tolist() if np.float32(0.6) < np.float32(value) <= np.float32(0.7)]
    assert found.num_pairs == len(between) > 10
    assert [value for _, _, value in found.pairs] == sorted(between, reverse=True)[:10]
    first, second, value = found.pairs[0]
    row = {bytes(one).hex(): place for place, one in enumerate(facts.ids)}
    assert similarities_of_edges(edges, 150)(np.array([row[second]]), np.array([row[first]])).tolist() == [np.float32(value)]
    text = "\n".join(found.lines())
    assert "dup_threshold 0.6 -> 0.7" in text
    assert first[:12] in text


def test_facts_that_do_not_give_what_was_recorded_are_told(tmp_path):
    ledger, edges, _ = make_ledger(tmp_path)
    thinned = Edges(*(column[::2] for column in edges))
    lines = what_if(read_pool_facts(ledger), thinned, {"dup_threshold": 0.65}, edge_floor=FLOOR).lines()
    assert any(line.startswith("caution: stage copies dropped") for line in lines)


def test_similarities_may_come_from_the_vectors_instead(tmp_path):
    ledger, edges, (vectors, *_) = make_ledger(tmp_path)
    facts = read_pool_facts(ledger)

    def exact(left, right):
        return np.einsum("nd,nd->n", vectors[left], vectors[right])

    same = outcome(facts, edges, facts.settings, exact)
    stored = outcome(facts, edges, facts.settings, similarities_of_edges(edges, 150))
    assert same.representative.tolist() == stored.representative.tolist()


def test_what_is_not_stored_is_refused(tmp_path):
    ledger, edges, _ = make_ledger(tmp_path)
    facts = read_pool_facts(ledger)
    for overrides, message in (
        ({"dup_threshold": 0.4}, "dup_threshold=0.4 is below 0.45"),
        ({"max_nsfw_score": 0.95}, "were never compared"),
        ({"target": 1.0}, "what-if knows no target"),
    ):
        with pytest.raises(UsageError, match=message):
            what_if(facts, edges, overrides, edge_floor=FLOOR)


def test_words_become_settings_and_a_range_a_sweep(tmp_path):
    assert parse_overrides(["dup_threshold=0.7"]) == [{"dup_threshold": 0.7}]
    sweep = parse_overrides(["dup_threshold=0.5..0.8", "max_nsfw_score=0.5"])
    assert [known["dup_threshold"] for known in sweep] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8]
    for bad in (["dup_threshold"], ["dup_threshold=x"], ["dup_threshold=7"], ["dup_threshold=nan"], ["a=0..1", "b=0..1"]):
        with pytest.raises(UsageError):
            parse_overrides(bad)
    ledger, edges, _ = make_ledger(tmp_path)
    facts = read_pool_facts(ledger)
    lines = sweep_lines(
        [what_if(facts, edges, known, edge_floor=FLOOR) for known in parse_overrides(["dup_threshold=0.5..0.8"])]
    )
    assert len(lines) == 9
    assert "as it was" in lines[1]
    left = [int(line.split()[-3].replace(",", "")) for line in lines[2:]]
    assert left == sorted(left)


def test_stored_edges_are_read_above_a_threshold_only(tmp_path):
    edges = all_edges(groups_of_copies(100, 7))
    store = LocalStore(tmp_path)
    half = edges.num_edges // 2
    write_edges(store, edges_key("edges/", 0), Edges(*(column[:half] for column in edges)))
    write_edges(store, edges_key("edges/", 1), Edges(*(column[half:] for column in edges)))
    for found, expected in zip(read_edges_above(store, "edges/", 0.7), edges.above(0.7), strict=True):
        assert found.tolist() == expected.tolist()
    assert read_edges_above(store, "none/", 0.7).num_edges == 0


def test_an_empty_ledger_has_nothing_to_ask(tmp_path):
    table = pa.table({"id": pa.array([], pa.string()), "source": pa.array([], pa.string())})
    write_ledger(LocalStore(tmp_path), TableRows((table,)), LedgerFacts(np.empty((0, 32), np.uint8)), Decisions.of(0))
    with pytest.raises(DataError, match="holds no image"):
        read_pool_facts(open_ledger(LocalStore(tmp_path)))
