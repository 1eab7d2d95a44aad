"""The whole curate stage on small sets."""

import numpy as np
import pyarrow as pa
import pytest

from heliostat.curation.config import CurateConfig
from heliostat.curation.curate import curate
from heliostat.curation.ledger import explain
from heliostat.errors import DataError

REJECTED = pa.table({"source": ["z.png", "broken.png"], "reason": ["truncated", "not_an_image"], "detail": ["short", None]})


def pool(num_images: int = 120, seed: int = 0) -> tuple[pa.Table, np.ndarray]:
    """Random images; every 10th is an exact duplicate of the one before, every 10th + 5 a copy with fewer pixels."""
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((num_images, 32)).astype(np.float32)
    ids = [f"{generator.integers(2**62):064x}" for _ in range(num_images)]
    widths = np.full(num_images, 100)
    for row in range(9, num_images, 10):
        ids[row], vectors[row] = ids[row - 1], vectors[row - 1]
    for row in range(5, num_images, 10):
        vectors[row] = vectors[row - 1] + 0.1 * generator.standard_normal(32)
        widths[row] = 50
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pa.table(
        {
            "id": ids,
            "shard": ["000000.tar"] * num_images,
            "offset": pa.array(range(num_images), pa.int64()),
            "length": pa.array([1000] * num_images, pa.int64()),
            "width": pa.array(widths, pa.int32()),
            "height": pa.array([100] * num_images, pa.int32()),
            "format": ["png"] * num_images,
            "source": [f"{row:04d}.png" for row in range(num_images)],
            "label": pa.nulls(num_images, pa.string()),
        }
    )
    return table, vectors


def config(**sections: dict) -> CurateConfig:
    return CurateConfig.model_validate({"balance": {"target_images": "all"}, **sections})


def test_exact_duplicates_and_copies_leave_one_each_and_the_funnel_adds_up():
    table, vectors = pool()
    result = curate(table, rejected=REJECTED, embeddings=vectors, config=config())
    assert [(step.stage, step.rows_in, step.rows_kept) for step in result.funnel] == [
        ("decode", 122, 120), ("exact", 120, 108), ("copies", 108, 96), ("balance", 96, 96),
    ]  # fmt: skip
    assert result.kept_ids == sorted(result.kept_ids)
    assert len(result.kept_ids) == 96
    rows = {row["source"]: row for row in result.ledger.to_pylist()}
    assert rows["0009.png"]["reason"] == "exact_duplicate"
    assert rows["0009.png"]["component"] == rows["0008.png"]["component"]
    assert rows["0005.png"]["reason"] == "copy"
    assert rows["0005.png"]["representative"] == rows["0004.png"]["id"] == rows["0005.png"]["nearest_copy"]
    assert rows["0004.png"]["decision"] == "kept"
    assert any("represented by" in sentence for sentence in explain(result.ledger, "0005.png"))
    assert result.statistics["copies"]["num_components_of_copies"] == 12


def test_the_outcome_does_not_depend_on_the_order_of_the_manifest_and_repeats_itself():
    table, vectors = pool()
    settings = config(balance={"target_images": 40})
    first = curate(table, rejected=REJECTED, embeddings=vectors, config=settings, seed=3)
    shuffled = np.random.default_rng(1).permutation(120)
    second = curate(table.take(shuffled), rejected=REJECTED.take([1, 0]), embeddings=vectors[shuffled], config=settings, seed=3)
    assert first.ledger.equals(second.ledger, check_metadata=True)
    assert first.kept_ids == second.kept_ids
    assert len(first.kept_ids) == 40
    other = curate(table, rejected=REJECTED, embeddings=vectors, config=settings, seed=4)
    assert other.kept_ids != first.kept_ids


def test_retrieval_keeps_what_curated_images_reach_and_names_them():
    table, vectors = pool()
    curated = vectors[[0, 20]]
    result = curate(
        table,
        rejected=REJECTED,
        embeddings=vectors,
        curated_embeddings=curated,
        curated_ids=["first", "second"],
        config=config(retrieval={"mode": "sample", "neighbors": 3}),
    )
    rows = {row["source"]: row for row in result.ledger.to_pylist()}
    assert rows["0000.png"]["retrieved_by"][0] == {"curated_id": "first", "rank": 1, "similarity": pytest.approx(1.0)}
    assert 3 <= len(result.kept_ids) <= 6
    assert {row["reason"] for row in rows.values() if row["stage"] == "retrieval"} == {"not_retrieved"}
    kept = [row for row in rows.values() if row["decision"] == "kept"]
    assert all(row["retrieved_by"] and row["cluster"] is not None for row in kept)
    assert any("Curated image first" in sentence for sentence in explain(result.ledger, "0000.png"))


def test_cluster_mode_and_semantic_embeddings_are_used_for_retrieval_only():
    table, vectors = pool()
    semantic = np.zeros((120, 4), np.float32)
    semantic[np.arange(120), np.arange(120) % 2] = 1.0
    result = curate(
        table,
        rejected=REJECTED,
        embeddings=vectors,
        semantic_embeddings=semantic,
        curated_embeddings=np.repeat(semantic[:1], 4, axis=0),
        curated_ids=list("abcd"),
        config=config(retrieval={"mode": "cluster", "num_clusters": 2}, clusters={"num_clusters": 1}),
    )
    kept = [row for row in result.ledger.to_pylist() if row["decision"] == "kept"]
    assert kept
    assert all(int(row["source"][:4]) % 2 == 0 for row in kept)
    assert result.statistics["retrieval"]["num_matched_clusters"] == 1


def test_decontamination_drops_the_component_even_when_only_its_dropped_copy_shows_the_reference():
    table, vectors = pool()
    result = curate(
        table,
        rejected=REJECTED,
        embeddings=vectors,
        evaluation_embeddings=vectors[[5]],
        evaluation_ids=["test-image"],
        config=config(copies={"decontamination_threshold": 0.9999}),
    )
    rows = {row["source"]: row for row in result.ledger.to_pylist()}
    assert rows["0004.png"]["reason"] == "shows_evaluation_image"
    assert rows["0005.png"]["nearest_reference"] == "test-image"
    assert [step.stage for step in result.funnel] == ["decode", "exact", "copies", "decontaminate", "balance"]


def test_limits_follow_the_embedder_when_they_are_auto():
    assert config().copies.limits("thumbnail").threshold == 0.86
    assert config().copies.limits("model/vits@1").threshold == 0.6
    assert config(copies={"threshold": 0.7}).copies.limits("thumbnail").threshold == 0.7
    table, vectors = pool()
    statistics = curate(table, rejected=REJECTED, embeddings=vectors, config=config()).statistics
    assert statistics["copies"]["limits"]["threshold"] == 0.86


def test_stages_that_are_off_are_not_in_the_funnel():
    table, vectors = pool()
    settings = config(exact={"enabled": False}, copies={"enabled": False})
    result = curate(table, rejected=REJECTED, embeddings=vectors, config=settings)
    assert [step.stage for step in result.funnel] == ["decode", "balance"]
    assert result.ledger["component"].null_count == 122


def test_requests_that_cannot_be_served_say_why():
    table, vectors = pool()
    with pytest.raises(DataError, match=r"retrieval\.mode=sample needs curated images"):
        curate(table, rejected=REJECTED, embeddings=vectors, config=config(retrieval={"mode": "sample"}))
    with pytest.raises(DataError, match="119 embeddings for 120 images"):
        curate(table, rejected=REJECTED, embeddings=vectors[1:], config=config())
    with pytest.raises(DataError, match="the manifest has no column 'offset'"):
        curate(table.drop_columns("offset"), rejected=REJECTED, embeddings=vectors, config=config())
    with pytest.raises(DataError, match="2 curated embeddings for 1 curated ids"):
        curate(table, rejected=REJECTED, embeddings=vectors, config=config(), curated_embeddings=vectors[:2], curated_ids=["a"])
    with pytest.raises(DataError, match="no image is left"):
        curate(table.slice(0, 0), rejected=REJECTED, embeddings=vectors[:0], config=config())
