"""The self-join by every way against a full matrix, in pieces, again, and with a new crawl."""

import numpy as np
import pytest
from similar_vectors import as_list, planted, slow_edges

from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.edges import edge_keys, iterate_edges, make_edges, merge_edge_files
from heliostat.curation.join import self_join
from heliostat.curation.tasks import run_serially
from heliostat.curation.vectors import ArrayVectors, JoinedVectors
from heliostat.errors import ConfigError, DataError
from heliostat.storage import LocalStore

SMALL = {"edge_floor": 0.45, "rows_per_strip": 100, "rows_per_range": 150, "audit_rows": 200, "neighbors": 4}


def config(via: str = "exact", **changes) -> JoinConfig:
    return JoinConfig(via=via, **{**SMALL, "bucket_rows": 60, "overlap": 3, **changes})


def join(folder, vectors, settings, run=run_serially, **keywords):
    files, work = LocalStore(folder / "files"), LocalStore(folder / "work")
    summary = self_join(vectors, files=files, prefix="edges/", work=work, config=settings, run=run, **keywords)
    return summary, files


def stored(files) -> list[tuple[int, int, float]]:
    return [edge for edges in iterate_edges(files, "edges/") for edge in as_list(edges)]


def test_the_exact_join_stores_the_edges_of_a_full_matrix_in_files_of_rows(tmp_path):
    vectors = planted(500, 32)
    summary, files = join(tmp_path, ArrayVectors(vectors, rows_per_block=64), config())
    assert stored(files) == slow_edges(vectors, 0.45, 4)
    assert summary.num_edges == len(stored(files)) > 100
    assert summary.audit.recall == 1.0
    assert edge_keys(files, "edges/") == [f"edges/edges-{number:05d}.parquet" for number in range(4)]
    for number, edges in enumerate(iterate_edges(files, "edges/")):
        assert (edges.first // 150 == number).all()


@pytest.mark.parametrize("changes", [{"rows_per_strip": 1000}, {"rows_per_strip": 1}, {"rows_per_range": 10_000}])
def test_edges_do_not_depend_on_how_the_work_is_cut(tmp_path, changes):
    vectors = planted(300, 24)
    _, files = join(tmp_path, ArrayVectors(vectors, rows_per_block=37), config(**changes))
    assert stored(files) == slow_edges(vectors, 0.45, 4)


@pytest.mark.parametrize("via", ["buckets", "faiss"])
def test_approximate_joins_store_a_part_of_the_exact_edges_with_the_same_similarities(tmp_path, via):
    vectors = planted(900, 32)
    summary, files = join(tmp_path, ArrayVectors(vectors, rows_per_block=128), config(via, neighbors=64))
    true = set(slow_edges(vectors, 0.45, 64))
    found = set(stored(files))
    assert found <= true
    assert len(found) > 0.8 * len(true)
    assert summary.audit.recall == pytest.approx(len(found) / len(true), abs=0.1)
    assert sum(band.num_true for band in summary.audit.bands[3:]) > 0
    assert all(band.recall > 0.9 for band in summary.audit.bands[3:] if band.recall is not None)


def test_buckets_that_cover_each_other_and_split_find_what_the_exact_join_finds(tmp_path):
    vectors = planted(600, 24)
    everything = config("buckets", overlap=10)
    _, files = join(tmp_path / "one", ArrayVectors(vectors), everything)
    assert stored(files) == slow_edges(vectors, 0.45, 4)
    split, files = join(
        tmp_path / "split", ArrayVectors(vectors), config("buckets", overlap=4, max_bucket_rows=200, neighbors=64)
    )
    assert set(stored(files)) <= set(slow_edges(vectors, 0.45, 64))
    assert split.audit.recall > 0.9


@pytest.mark.parametrize("via", ["exact", "buckets", "faiss"])
def test_a_repeated_run_does_nothing_again_and_a_killed_one_goes_on_to_the_same_bytes(tmp_path, via):
    vectors = ArrayVectors(planted(400, 16), rows_per_block=50)
    _, files = join(tmp_path / "whole", vectors, config(via))
    expected = {info.key: files.read(info.key) for info in files.list()}
    done: list[str] = []

    def stops_after(limit):
        def run(function, tasks, *, label, has_state=False):
            for task in reversed(tasks):
                if len(done) >= limit:
                    raise KeyboardInterrupt
                done.append(task["done"])
                yield from run_serially(function, [task], label=label)

        return run

    for limit in (1, 4, 9, 10_000):
        try:
            _, again = join(tmp_path / "killed", vectors, config(via), run=stops_after(limit))
        except KeyboardInterrupt:
            assert limit < 10_000
    assert {info.key: again.read(info.key) for info in again.list()} == expected
    assert len(done) == len(set(done))
    join(tmp_path / "killed", vectors, config(via), run=stops_after(0))


@pytest.mark.parametrize("split", [1, 100, 237, 399])
def test_a_new_crawl_joined_against_the_old_gives_the_edges_of_one_join_of_all(tmp_path, split):
    vectors = planted(400, 16)
    old, new = ArrayVectors(vectors[:split], rows_per_block=40), ArrayVectors(vectors[split:], rows_per_block=40)
    _, old_files = join(tmp_path / "old", old, config())
    summary, new_files = join(tmp_path / "new", JoinedVectors((old, new)), config(), first_new_row=split)
    assert all(second >= split for _, second, _ in stored(new_files))
    assert summary.audit.num_images == min(200, 400 - split)
    assert summary.audit.recall in (1.0, None)
    merged = LocalStore(tmp_path / "merged")
    merge_edge_files(
        [(old_files, "edges/"), (new_files, "edges/")],
        files=merged,
        prefix="edges/",
        work=LocalStore(tmp_path / "merge-work"),
        run=run_serially,
        num_rows=400,
        rows_per_range=150,
        neighbors=4,
    )
    assert stored(merged) == slow_edges(vectors, 0.45, 4)


def test_old_strips_are_not_compared_with_each_other_again(tmp_path):
    vectors = ArrayVectors(planted(400, 16), rows_per_block=100)
    tasks_run = []

    def run(function, tasks, *, label, has_state=False):
        tasks_run.extend(task["key"] for task in tasks if label == "exact join")
        return run_serially(function, tasks, label=label)

    join(tmp_path, vectors, config(), run=run, first_new_row=300)
    assert tasks_run == [f"pairs/{top:05d}-00003" for top in range(4)]


@pytest.mark.parametrize("via", ["buckets", "faiss"])
def test_a_new_crawl_joined_approximately_stores_pairs_with_a_new_image_alone(tmp_path, via):
    vectors = planted(500, 16)
    _, files = join(tmp_path, ArrayVectors(vectors, rows_per_block=100), config(via, neighbors=64), first_new_row=350)
    true = {edge for edge in slow_edges(vectors, 0.45, 500) if edge[1] >= 350}
    assert set(stored(files)) <= true
    assert len(stored(files)) > 0.7 * len(true)


@pytest.mark.parametrize("via", ["exact", "buckets", "faiss"])
def test_no_image_one_image_and_absent_images_give_no_edges_and_no_recall(tmp_path, via):
    for number, vectors in enumerate(
        [
            ArrayVectors(np.empty((0, 8), np.float16)),
            ArrayVectors(planted(1, 8)),
            ArrayVectors(planted(50, 8), kept=np.zeros(50, np.bool_), rows_per_block=20),
        ]
    ):
        summary, files = join(tmp_path / str(number), vectors, config(via))
        assert (summary.num_edges, summary.audit.recall, stored(files)) == (0, None, [])


@pytest.mark.parametrize("via", ["exact", "buckets", "faiss"])
def test_absent_rows_have_no_edges_and_the_others_keep_their_numbers(tmp_path, via):
    vectors = planted(300, 16)
    kept = np.random.default_rng(0).random(300) < 0.7
    _, files = join(tmp_path, ArrayVectors(vectors, kept=kept, rows_per_block=32), config(via, overlap=10, neighbors=64))
    true = slow_edges(vectors[kept], 0.45, 64, np.flatnonzero(kept))
    assert set(stored(files)) <= set(true)
    assert len(stored(files)) > 0.95 * len(true)


@pytest.mark.parametrize("via", ["exact", "buckets", "faiss"])
def test_all_duplicates_are_one_component_of_bounded_edges(tmp_path, via):
    vectors = ArrayVectors(np.repeat(planted(1, 16), 500, axis=0), rows_per_block=100)
    _, files = join(tmp_path, vectors, config(via, max_bucket_rows=100))
    edges = make_edges(*np.array(stored(files)).T)
    assert edges.num_edges <= 500 * 4
    assert (edges.similarity == edges.similarity[0]).all()


def test_auto_is_exact_up_to_the_limit_and_goes_through_buckets_beyond(tmp_path):
    vectors = ArrayVectors(planted(200, 16))
    assert join(tmp_path / "a", vectors, config("auto", exact_max_rows=200))[0].via == "exact"
    assert join(tmp_path / "b", vectors, config("auto", exact_max_rows=199))[0].via == "buckets"


def test_a_floor_that_depends_on_the_embedder_must_be_resolved_first(tmp_path):
    with pytest.raises(ConfigError, match="edge_floor is auto"):
        join(tmp_path, ArrayVectors(planted(10, 8)), JoinConfig(via="exact"))
    assert JoinConfig().resolved("sscd").floor == 0.45
    assert JoinConfig().resolved("thumbnail").floor == 0.7
    assert JoinConfig(edge_floor=0.3).resolved("thumbnail").floor == 0.3


def test_vectors_that_are_not_normalised_stop_the_join_with_their_row(tmp_path):
    with pytest.raises(DataError, match="row 0 has length 3"):
        join(tmp_path, ArrayVectors(planted(10, 8) * np.float16(3)), config())
