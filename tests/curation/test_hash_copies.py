"""Groups by PCA hash: against all pairs compared slowly, whatever the order of rows, without chains."""

import itertools
import time

import cv2
import numpy as np
import pytest

from heliostat.curation.features_config import HashConfig
from heliostat.curation.hash_copies import hash_copies
from heliostat.curation.pca_hash import HashColumns, PcaHash, thumbnail_of
from heliostat.data.photographs import photographs
from heliostat.errors import DataError

CONFIG = HashConfig()


def columns_of(codes: list[int], coarse: np.ndarray | None = None, contrast: float = 30.0) -> HashColumns:
    count = len(codes)
    values = np.zeros((count, 16), np.int8) if coarse is None else np.asarray(coarse, np.int8)
    return HashColumns(np.array(codes, np.uint64), values, np.full(count, contrast, np.float32))


def slow_is_copy(columns: HashColumns, one: int, other: int) -> bool:
    bits = bin(int(columns.code[one]) ^ int(columns.code[other])).count("1")
    apart = sum((int(a) - int(b)) ** 2 for a, b in zip(columns.coarse[one], columns.coarse[other], strict=True)) ** 0.5 / 32
    return bits <= CONFIG.max_differing_bits and apart <= CONFIG.max_distance


def slow_is_candidate(columns: HashColumns, one: int, other: int) -> bool:
    differing = int(columns.code[one]) ^ int(columns.code[other])
    return sum((differing >> start) & 0xFFFF == 0 for start in (0, 16, 32, 48)) >= 2


def clouds(seed: int, count: int = 300) -> tuple[HashColumns, np.ndarray]:
    """Few originals with many copies of one to six flipped bits and small steps: dense enough for chains."""
    rng = np.random.default_rng(seed)
    codes, coarse = rng.integers(0, 2**64, 20, dtype=np.uint64), rng.integers(-100, 101, (20, 16))
    source = rng.integers(0, 20, count)
    flips = np.zeros(count, np.uint64)
    for _ in range(6):
        flips ^= np.where(rng.random(count) < 0.35, np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64), np.uint64(0))
    near = np.clip(coarse[source] + rng.integers(-4, 5, (count, 16)), -127, 127)
    contrast = np.where(rng.random(count) < 0.1, 1.0, 30.0)
    columns = HashColumns(codes[source] ^ flips, near.astype(np.int8), contrast.astype(np.float32))
    return columns, rng.permutation(count)


@pytest.mark.parametrize("seed", range(5))
def test_every_dropped_image_is_a_copy_of_a_better_survivor_and_no_equal_images_both_stay(seed):
    columns, rank = clouds(seed)
    result = hash_copies(columns, rank, CONFIG)
    assert result.dropped.sum() > 50
    for row, survivor in enumerate(result.survivor.tolist()):
        assert result.survivor[survivor] == survivor
        if survivor != row:
            assert rank[survivor] < rank[row]
            assert slow_is_copy(columns, row, survivor)
            assert min(columns.contrast[row], columns.contrast[survivor]) >= CONFIG.min_contrast
            squared = ((columns.coarse[row].astype(int) - columns.coarse[survivor]) ** 2).sum()
            assert result.distance[row] == pytest.approx(squared**0.5 / 32, abs=1e-6)
        else:
            assert result.distance[row] == 0


@pytest.mark.parametrize("seed", range(5))
def test_of_copies_that_share_two_blocks_of_bits_hardly_two_survive(seed):
    columns, rank = clouds(seed)
    result = hash_copies(columns, rank, CONFIG)
    everyone = np.flatnonzero(columns.contrast >= CONFIG.min_contrast).tolist()
    pairs = [(one, other) for one, other in itertools.combinations(everyone, 2) if slow_is_candidate(columns, one, other)]
    copies = [pair for pair in pairs if slow_is_copy(columns, *pair)]
    assert len(copies) > 100
    assert sum(not result.dropped[list(pair)].any() for pair in copies) < 0.05 * len(copies)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_rows_does_not_matter(seed):
    columns, rank = clouds(seed)
    result = hash_copies(columns, rank, CONFIG)
    order = np.random.default_rng(seed + 100).permutation(len(rank))
    moved = HashColumns(columns.code[order], columns.coarse[order], columns.contrast[order])
    again = hash_copies(moved, rank[order], CONFIG)
    np.testing.assert_array_equal(order[again.survivor], result.survivor[order])
    np.testing.assert_array_equal(again.distance, result.distance[order])


@pytest.mark.parametrize("bits", [(0,), (63,), (0, 63), (5, 20), (31, 32)])
def test_all_pairs_of_up_to_two_differing_bits_are_found(bits):
    code = 0x0123456789ABCDEF
    other = code
    for bit in bits:
        other ^= 1 << bit
    assert hash_copies(columns_of([code, other]), np.array([1, 0]), CONFIG).survivor.tolist() == [1, 1]


def test_differing_bits_and_distance_both_have_limits():
    code = 2**64 - 1
    limit = CONFIG.max_differing_bits
    near, far = code ^ ((1 << limit) - 1), code ^ ((1 << (limit + 1)) - 1)
    assert hash_copies(columns_of([code, near]), np.arange(2), CONFIG).survivor.tolist() == [0, 0]
    assert hash_copies(columns_of([code, far]), np.arange(2), CONFIG).survivor.tolist() == [0, 1]
    coarse = np.zeros((2, 16))
    coarse[1, 0] = round(CONFIG.max_distance * 32) - 1
    assert hash_copies(columns_of([code, code], coarse), np.arange(2), CONFIG).survivor.tolist() == [0, 0]
    coarse[1, 0] += 2
    assert hash_copies(columns_of([code, code], coarse), np.arange(2), CONFIG).survivor.tolist() == [0, 1]


def test_int8_differences_do_not_overflow():
    coarse = np.zeros((2, 16))
    coarse[:, 0] = -127, 127
    assert hash_copies(columns_of([7, 7], coarse), np.arange(2), CONFIG).survivor.tolist() == [0, 1]


def test_a_chain_does_not_put_an_image_under_one_that_it_does_not_resemble():
    coarse = np.zeros((4, 16))
    coarse[:, 0] = 0, 10, 20, 20
    codes = [3, 0, 0, 0]  # the best differs in two bits, so the second gathers the others before it is merged itself
    result = hash_copies(columns_of(codes, coarse), np.arange(4), CONFIG)
    assert result.survivor.tolist() == [0, 0, 2, 2]


def test_flat_images_stay_even_when_equal_and_switched_off_nothing_is_merged():
    flat = columns_of([5, 5], contrast=CONFIG.min_contrast - 0.1)
    assert hash_copies(flat, np.arange(2), CONFIG).survivor.tolist() == [0, 1]
    textured = columns_of([5, 5])
    assert hash_copies(textured, np.arange(2), HashConfig(enabled=False)).survivor.tolist() == [0, 1]


def test_none_one_and_all_alike():
    assert hash_copies(columns_of([]), np.empty(0, np.int64), CONFIG).survivor.tolist() == []
    assert hash_copies(columns_of([9]), np.zeros(1, np.int64), CONFIG).survivor.tolist() == [0]
    rank = np.random.default_rng(0).permutation(1000)
    result = hash_copies(columns_of([9] * 1000), rank, CONFIG)
    assert set(result.survivor.tolist()) == {int(np.argmin(rank))}


def test_ranks_that_are_no_order_and_columns_of_other_lengths_are_refused():
    with pytest.raises(DataError, match="each of 0 to 1 once"):
        hash_copies(columns_of([1, 2]), np.array([0, 0]), CONFIG)
    with pytest.raises(DataError, match="each of 0 to 1 once"):
        hash_copies(columns_of([1, 2]), np.array([0, -1]), CONFIG)
    with pytest.raises(DataError, match="one of each per image"):
        hash_copies(columns_of([1, 2]), np.arange(3), CONFIG)


def test_many_images_with_one_code_cost_seconds_and_not_their_pairs():
    count = 100_000
    rng = np.random.default_rng(0)
    coarse = np.where(np.arange(count)[:, None] % 2 == 0, 5, rng.integers(-100, 101, (count, 16)))
    started = time.process_time()
    result = hash_copies(columns_of([77] * count, coarse), rng.permutation(count), CONFIG)
    assert time.process_time() - started < 20
    assert result.dropped[::2].sum() == count // 2 - 1
    assert result.dropped[1::2].sum() < 100


def test_recompressed_and_halved_photographs_are_merged_and_others_are_not():
    originals = [image for name, image in photographs().items() if name != "brick"]  # five bits differ: its joints alias
    copies = []
    for image in originals:
        _, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 40])
        copies.append(
            cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        )
    columns = PcaHash.load().hash(np.stack([thumbnail_of(np.ascontiguousarray(image)) for image in originals + copies]))
    assert (columns.contrast >= CONFIG.min_contrast).all()
    result = hash_copies(columns, np.arange(32), CONFIG)
    assert result.survivor.tolist() == [*range(16), *range(16)]
