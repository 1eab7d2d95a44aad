"""From features to decisions: each stage sees what the one before left, and a new crawl is joined with the old ones."""

from pathlib import Path

import numpy as np
import pytest
from made_features import DIMENSION, made_features, near

from heliostat.curation.config import DedupConfig
from heliostat.curation.copies_rows import CopiesRows, decisions_of, read_copies_rows
from heliostat.curation.dedup import EDGES, DedupInputs, Deduplicated, dedup
from heliostat.curation.edges import iterate_edges
from heliostat.curation.forget_list import ForgetList, parse_target, read_forget_list, request_bytes, request_key
from heliostat.curation.pool import FeatureFiles, Pool
from heliostat.curation.tasks import run_serially
from heliostat.errors import DataError
from heliostat.storage import LocalStore

NOTHING_FORGOTTEN = ForgetList(np.empty((0, 32), np.uint8), np.empty(0, np.uint64), frozenset(), frozenset())


def random_vectors(count: int, seed: int = 0) -> np.ndarray:
    """As unlike each other as can be: orthogonal."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((DIMENSION, DIMENSION)))[0][:count]


def run(
    folder: Path,
    pool: Pool,
    *,
    references: dict[str, FeatureFiles] | None = None,
    forgotten: ForgetList = NOTHING_FORGOTTEN,
    old=None,
    **settings,
) -> Deduplicated:
    files = LocalStore(folder)
    given = DedupInputs(pool, references or {}, forgotten, *(old or (0, None)))
    config = DedupConfig.model_validate(settings)
    found = dedup(given, config, files=files, work=files.child("_work/dedup"), run=run_serially)
    found.rows.write(files)
    return found


def funnel(found: Deduplicated) -> dict[str, tuple[int, int]]:
    return {count.stage: (count.rows_in, count.rows_kept) for count in found.decisions.counts}


def reasons(found: Deduplicated) -> list[str]:
    return [found.decisions.causes[code][1] for code in found.decisions.cause]


def test_every_stage_drops_its_own_and_hands_on_the_rest(tmp_path: Path) -> None:
    base = random_vectors(20)
    vectors = np.concatenate([base, base[:3], near(base[3:6], 0.8, 1), near(base[6:7], 0.5, 2), base[7:8]])
    contents = [f"image {row}" for row in range(20)] + ["image 0", "a", "b"] + [f"copy {row}" for row in range(5)]
    codes = [1 << 60 | row * 0x0123456789AB for row in range(28)]
    codes[21] = codes[1]  # the same hash as image 1, other bytes
    nsfw = [0.1] * 28
    nsfw[2] = 0.95
    features = made_features(LocalStore(tmp_path / "f"), vectors, contents=contents, codes=codes, nsfw=nsfw, undecodable=[8])
    found = run(tmp_path / "d", Pool((features,)))
    assert funnel(found) == {
        "decode": (28, 27),
        "nsfw": (27, 26),
        "exact": (26, 25),
        "hash": (25, 24),
        "copies": (24, 20),
    }
    told = reasons(found)
    assert (told[8], told[2], told[20]) == ("truncated", "above_nsfw_threshold", "exact_duplicate")
    assert {told[1], told[21]} == {"", "hash_copy"}
    assert sorted([told[3], told[23]]) == ["", "copy"]
    assert told[26] == ""  # 0.5 is no copy
    assert found.rows.duplicate_of[20] == 0
    assert found.rows.component[20] == found.rows.component[0]
    assert found.rows.nearest[26] == 6
    assert found.rows.similarity[26] == pytest.approx(0.5, abs=0.01)


def test_decontamination_drops_the_whole_component_even_if_only_a_dropped_copy_shows_the_reference(tmp_path: Path) -> None:
    base = random_vectors(6)
    copy = near(base[:1], 0.7, 3)
    reference = near(copy, 0.65, 4)
    assert abs(float((reference @ base[0])[0])) < 0.6
    pool = made_features(LocalStore(tmp_path / "f"), np.concatenate([base, copy]), widths=[200] * 6 + [100])
    references = {"test": made_features(LocalStore(tmp_path / "r"), reference, name="features/reference@1")}
    limits = {"copies": {"threshold": 0.6, "min_similarity_to_representative": 0.5, "decontamination_threshold": 0.6}}
    found = run(tmp_path / "d", Pool((pool,)), references=references, **limits)
    assert reasons(found) == ["shows_evaluation_image", "", "", "", "", "", "copy"]
    assert found.rows.reference[6] == 0
    assert found.statistics["decontaminate"]["test"] == {"num_references": 1, "num_touched": 1, "num_dropped": 2}


def test_a_new_crawl_joined_with_an_old_one_gives_what_one_dedup_of_both_gives(tmp_path: Path) -> None:
    base = random_vectors(40)
    old = np.concatenate([base[:30], near(base[:8], 0.75, 5)])
    new = np.concatenate([base[30:], near(base[4:14], 0.7, 6), near(base[30:34], 0.9, 7), base[:2]])
    contents = [f"new {row}" for row in range(24)] + ["features/old@1 0", "features/old@1 1"]
    widths = [150] * 12 + [90] * 14  # some of the new are better than the old they repeat
    one = made_features(LocalStore(tmp_path / "a"), old, name="features/old@1")
    two = made_features(LocalStore(tmp_path / "b"), new, name="features/new@1", contents=contents, widths=widths)
    first = run(tmp_path / "old", Pool((one,)))
    second = run(tmp_path / "joined", Pool((one, two)), old=(38, (LocalStore(tmp_path / "old"), EDGES)))
    whole = run(tmp_path / "whole", Pool((one, two)))
    assert reasons(second) == reasons(whole)
    for name in ("component", "representative", "duplicate_of", "nearest", "similarity"):
        np.testing.assert_array_equal(getattr(second.rows, name), getattr(whole.rows, name), err_msg=name)
    edges = [list(iterate_edges(LocalStore(tmp_path / folder), EDGES)) for folder in ("joined", "whole")]
    for mine, theirs in zip(*edges, strict=True):
        for here, there in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(here, there)
    assert second.statistics["join"]["first_new_row"] == 38
    assert second.statistics["join"]["num_edges"] < len(edges[0][0].first)  # those of the old crawl were not looked for again
    assert first.statistics["join"]["num_edges"] > 0


def test_what_was_forgotten_is_dropped_by_id_and_by_source(tmp_path: Path) -> None:
    features = made_features(LocalStore(tmp_path / "f"), random_vectors(5))
    store = LocalStore(tmp_path / "store")
    identity = features.read(0, ["id"])["id"][2].as_py()
    for text, ids in ((identity, [identity]), (f"{features.name}/00004.png", [])):
        target = parse_target(text)
        store.put(request_key(target), request_bytes(target, ids))
    found = run(tmp_path / "d", Pool((features,)), forgotten=read_forget_list(store))
    assert reasons(found) == ["", "", "asked_to_forget", "", "asked_to_forget"]


def test_an_interrupted_dedup_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    base = random_vectors(30)
    features = made_features(LocalStore(tmp_path / "f"), np.concatenate([base, near(base[:10], 0.8, 1)]))
    whole = run(tmp_path / "whole", Pool((features,)), join={"rows_per_strip": 8})
    for stop in (1, 3, 6, 9, 12):
        folder = tmp_path / f"stopped-{stop}"
        config = DedupConfig.model_validate({"join": {"rows_per_strip": 8}})
        given = DedupInputs(Pool((features,)), {}, NOTHING_FORGOTTEN)
        with pytest.raises(KeyboardInterrupt):
            dedup(given, config, files=LocalStore(folder), work=LocalStore(folder / "_work/dedup"), run=stopping_after(stop))
        again = run(folder, Pool((features,)), join={"rows_per_strip": 8})
        np.testing.assert_array_equal(again.rows.representative, whole.rows.representative)
        for key in ("rows/000000.parquet", *(f"{EDGES}{path.name}" for path in (tmp_path / "whole" / EDGES).iterdir())):
            assert LocalStore(folder).read(key) == LocalStore(tmp_path / "whole").read(key)


def stopping_after(num_tasks: int):
    """A TaskMap that is interrupted when so many tasks have been done, over all calls."""
    calls = 0

    def interrupted(function, tasks, *, label: str, has_state: bool = False):
        nonlocal calls
        for result in run_serially(function, tasks, label=label, has_state=has_state):
            calls += 1
            if calls >= num_tasks:
                raise KeyboardInterrupt
            yield result

    return interrupted


@pytest.mark.parametrize("count", [1, 2])
def test_a_pool_of_one_picture_keeps_one(tmp_path: Path, count: int) -> None:
    features = made_features(LocalStore(tmp_path / "f"), np.repeat(random_vectors(1), count, axis=0), contents=["same"] * count)
    found = run(tmp_path / "d", Pool((features,)))
    assert len(found.decisions.rows) == 1
    assert found.statistics["components"]["num_singletons"] == 1


def test_a_pool_in_which_nothing_decodes_keeps_nothing_and_says_so(tmp_path: Path) -> None:
    found = run(tmp_path / "d", Pool((made_features(LocalStore(tmp_path / "f"), random_vectors(3), undecodable=[0, 1, 2]),)))
    assert len(found.decisions.rows) == 0
    assert funnel(found)["decode"] == (3, 0)


def test_a_pool_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the features hold no image"):
        run(tmp_path / "d", Pool((made_features(LocalStore(tmp_path / "f"), np.empty((0, DIMENSION))),)))


def test_the_rows_come_back_and_go_on_with_their_decisions(tmp_path: Path) -> None:
    features = made_features(LocalStore(tmp_path / "f"), random_vectors(9), undecodable=[4])
    found = run(tmp_path / "d", Pool((features,)))
    rows = read_copies_rows(LocalStore(tmp_path / "d"), 9)
    for name, array in vars(found.rows).items():
        np.testing.assert_array_equal(getattr(rows, name), array)
    again = decisions_of(
        rows, [list(cause) for cause in found.decisions.causes], [list(count) for count in found.decisions.counts]
    )
    np.testing.assert_array_equal(again.rows, found.decisions.rows)
    with pytest.raises(DataError, match="holds 9 rows, its pool has 10 images"):
        read_copies_rows(LocalStore(tmp_path / "d"), 10)
    assert isinstance(rows, CopiesRows)
