import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from heliostat.curation.copies_config import JoinConfig
from heliostat.curation.embed import ThumbnailEmbedder
from heliostat.curation.features import Instruments
from heliostat.curation.pca_hash import PcaHash
from heliostat.models.config import BackboneConfig
from heliostat.storage import LocalStore

ROOT = Path(__file__).parents[2]

PARTS = {"read": 0.5, "decode": 4.0, "hash": 1.0, "nsfw": 20.0, "faces": 50.0, "copy": 8.0, "write": 0.5}


@pytest.fixture
def projection(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("curate_projection")


@pytest.fixture
def sides(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("curate_sides")


def measured(projection, **changes):
    values = {
        "cpu_ms": PARTS,
        "prepare_ms": {"copy": 1.0, "semantic": 2.0},
        "image_bytes": 50_000.0,
        "feature_bytes": 88.0,
        "dimension": 256,
        "copy_flops": 4e8,
        "join_rate": 2e10,
        "assign_rate": 4e10,
    }
    return projection.Measured(**values | changes)


def test_the_work_of_a_join_with_one_level_of_buckets_is_that_of_the_hand_computed_case(projection):
    work = projection.join_work(1000, JoinConfig(bucket_rows=100, overlap=2, rows_per_strip=300, rows_per_task=650))
    # 10 buckets of 200 members, 200 * 200 / 2 pairs each; 3 buckets a task; strips of 300, 300, 300, 100
    assert (work.buckets, work.products, work.comparisons) == (10, 10_000, 200_000)
    assert (work.tasks, work.strips) == (4, 4)


def test_a_bucket_that_is_too_large_is_counted_with_its_children(projection):
    config = JoinConfig(bucket_rows=100, overlap=2, max_buckets=10, max_bucket_rows=1000, rows_per_task=1000)
    work = projection.join_work(100_000, config)
    # 10 buckets of 20,000, split into 200 children of 20,000 * 2 / 200 = 200 members: 2,000 children of 200 * 200 / 2 pairs
    assert work.comparisons == 2_000 * 20_000
    assert work.products == 100_000 * 10 + 10 * 20_000 * 200
    assert work.tasks == 10


def test_core_hours_are_milliseconds_times_images_over_the_busy_share(projection):
    assumed = projection.Assumptions(num_images=3_600_000, core_busy_ratio=0.5)
    hours = {line.name: line.core_hours for line in projection.project(measured(projection), assumed)}
    # 3.6 million images at 1 ms are one hour, at half of the time two
    assert hours["pass: decode"] == pytest.approx(8.0)
    assert hours["pass: faces"] == pytest.approx(100.0)
    assert hours["pass: read, verify, write"] == pytest.approx(2.0)
    assert hours["pass: copy embedding"] == pytest.approx(16.0)


def test_gpu_hours_are_flops_over_the_peak_and_its_utilisation(projection):
    assumed = projection.Assumptions(num_images=3_600_000, core_busy_ratio=1.0, model_utilisation=0.5)
    semantic = BackboneConfig(embed_dim=64, depth=1, num_heads=1, patch_size=224, num_register_tokens=0)
    lines = projection.project(measured(projection), assumed, card="A100", semantic=semantic)
    by_name = {line.name: line for line in lines}
    # One patch and the cls token: 2 * 3 * 224^2 * 64; the block 2 tokens * 12 * 64^2 multiply-adds and 4 * 2^2 * 64.
    flops = 2 * 3 * 224**2 * 64 + 2 * 2 * 12 * 64**2 + 4 * 4 * 64
    assert by_name["pass: semantic embedding"].gpu_hours == pytest.approx(3_600_000 * flops / 156e12 / 3600)
    assert by_name["pass: copy embedding"].gpu_hours == pytest.approx(3_600_000 * 4e8 / 156e12 / 3600)
    assert by_name["pass: copy embedding"].core_hours == pytest.approx(1.0)
    assert by_name["join: comparisons"].core_hours == 0


def test_the_join_on_cores_takes_its_flops_over_the_measured_rate(projection):
    assumed = projection.Assumptions(num_images=100_000, core_busy_ratio=1.0)
    config = JoinConfig(bucket_rows=1000, overlap=4)
    by_name = {line.name: line for line in projection.project(measured(projection), assumed, join=config)}
    # 100 buckets of 4,000 members: 100 * 4000^2 / 2 pairs of 512 FLOPs; 100,000 * 100 products of 512 FLOPs
    assert by_name["join: comparisons"].core_hours == pytest.approx(100 * 4000**2 / 2 * 512 / 2e10 / 3600)
    assert by_name["join: vectors into buckets"].core_hours == pytest.approx(100_000 * 100 * 512 / 4e10 / 3600)


def test_what_is_kept_is_features_with_vectors_edges_and_ledger(projection):
    assumed = projection.Assumptions(num_images=1_000_000, months_kept=2.0)
    kept = {line.name: line.gigabyte_months for line in projection.project(measured(projection), assumed)}
    assert kept["kept: features"] == pytest.approx(2 * 0.6)  # 88 + 512 bytes
    assert kept["kept: edges"] == pytest.approx(2 * 0.1)
    assert kept["kept: ledger"] == pytest.approx(2 * 0.25)


def test_a_line_costs_hours_storage_and_requests_at_their_prices(projection):
    prices = projection.Assumptions(
        core_hour_dollars=0.1,
        h100_hour_dollars=2.0,
        gigabyte_month_dollars=0.02,
        thousand_puts_dollars=0.01,
        thousand_gets_dollars=0.001,
    )
    line = projection.Line("all", core_hours=10, gpu_hours=3, gigabyte_months=50, puts=2000, gets=4000)
    assert line.dollars(prices, "H100") == pytest.approx(1.0 + 6.0 + 1.0 + 0.02 + 0.004)
    assert line.dollars(prices, None) == pytest.approx(1.0 + 1.0 + 0.02 + 0.004)


def test_reading_requests_of_the_join_are_two_for_each_strip_and_task(projection):
    assumed = projection.Assumptions(num_images=1000, images_per_task=100)
    config = JoinConfig(bucket_rows=100, overlap=2, rows_per_strip=300, rows_per_task=650, rows_per_range=500)
    by_name = {line.name: line for line in projection.project(measured(projection), assumed, join=config)}
    assert by_name["join: comparisons"].gets == 2 * 4 * 4 + 2 * 4 * 2  # 4 strips, 4 tasks, 2 ranges
    assert by_name["join: vectors into buckets"].gets == 4 * (3 + 1 + 2)  # blocks, centroids, two writes read back
    assert projection.offsets_traffic_bytes(1000, config) == 8 * 11 * 4 * 4


def test_the_sum_is_the_sum_and_every_assumption_is_listed(projection):
    assumed = projection.Assumptions()
    lines = projection.project(measured(projection), assumed, card="H100", semantic=projection.SEMANTIC["ViT-L/14"])
    assert projection.total(lines).core_hours == pytest.approx(sum(line.core_hours for line in lines))
    assert projection.total(lines).dollars(assumed, "H100") == pytest.approx(
        sum(line.dollars(assumed, "H100") for line in lines)
    )
    listed = "\n".join(projection.assumption_lines(assumed))
    assert all(f"`{name}`" in listed for name in projection.Assumptions.model_fields)


def test_a_semantic_embedder_without_a_card_is_refused(projection):
    with pytest.raises(ValueError, match="name the card"):
        projection.project(measured(projection), projection.Assumptions(), semantic=projection.SEMANTIC["ViT-L/14"])


class BrightnessDetector:
    """Scores and one box an image, from its pixels."""

    name = version = "brightness"

    def scores(self, images):
        return np.array([image.mean() / 255 for image in images], np.float32)

    def boxes(self, images):
        return [np.full((int(image.mean()) % 3, 5), 0.5, np.float32) for image in images]


@pytest.fixture
def small(sides, tmp_path):
    """Shards of five images of 96 x 72 and instruments without networks."""
    sides.write_images(LocalStore(tmp_path / "raw"), 5, (96, 72), 2)
    detector = BrightnessDetector()
    tools = Instruments(hash=PcaHash.load(), nsfw=detector, faces=detector, copy=ThumbnailEmbedder(), semantic=None)
    (tmp_path / "scripts").mkdir()
    return sides.Shards(tmp_path / "raw", 5), tools


def test_our_pass_and_the_scripts_give_the_same_rows_and_every_part_of_the_time_is_counted(sides, small, tmp_path):
    shards, tools = small
    spent = sides.our_pass(shards, LocalStore(tmp_path / "ours"), tools, 2)
    theirs, rows = sides.one_script_per_question(shards, tmp_path / "scripts", tools)
    ours = sides.read_features(LocalStore(tmp_path / "ours"))
    sides.check_same(ours, rows, "the scripts")
    assert ours.num_rows == rows.num_rows == 5
    parts = sum(seconds for part, seconds in spent.items() if part != "all")
    assert 0 < parts <= spent["all"]
    assert theirs["all"] == pytest.approx(sum(theirs[part] for part in ("hash", "nsfw", "faces", "copy")))


def test_the_gate_sees_other_pixels(sides, small, tmp_path):
    shards, tools = small
    sides.our_pass(shards, LocalStore(tmp_path / "ours"), tools, 2)
    _, rows = sides.one_script_per_question(shards, tmp_path / "scripts", tools, lambda data: sides.pillow(data)[::-1].copy())
    with pytest.raises(RuntimeError, match="nothing was timed"):
        sides.check_same(sides.read_features(LocalStore(tmp_path / "ours")), rows, "the scripts")


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("id", lambda value: value[::-1]),
        ("pca_code", lambda value: value ^ 1),
        ("pca_coarse", lambda value: value[::-1]),
        ("nsfw", lambda value: value + 1e-3),
        ("num_faces", lambda value: value + 1),
        ("copy", lambda value: [value[0] + 0.01, *value[1:]]),
    ],
)
def test_the_gate_sees_one_other_value_in_any_column(sides, small, tmp_path, column, change):
    import pyarrow as pa

    shards, tools = small
    _, rows = sides.one_script_per_question(shards, tmp_path / "scripts", tools)
    values = rows[column].to_pylist()
    changed = pa.array([change(values[0]), *values[1:]], rows[column].type)
    other = rows.set_column(rows.column_names.index(column), column, changed)
    sides.check_same(rows, rows, "itself")
    with pytest.raises(RuntimeError, match="nothing was timed"):
        sides.check_same(rows, other, "another")


def test_a_part_of_the_shards_is_whole_tars_from_the_first(sides, small):
    shards, _ = small
    part = sides.Shards(shards.folder, 4)
    assert part.keys == shards.keys[:2]
    assert [bytes(data) for data in part.files()] == [bytes(data) for data in shards.files()][:4]


def test_the_clock_of_the_tree_counts_a_child_that_has_ended(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    clock = importlib.import_module("curate_in_ray").TreeClock()
    before = clock.seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1.2: pass"], check=True)
    spent = clock.seconds() - before
    clock.stop()
    assert 0.5 < spent < 3.0
