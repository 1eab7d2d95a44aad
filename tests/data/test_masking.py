from pathlib import Path

import numpy as np
import pytest

from heliostat.data.masking import MaskSettings, _add_block, _generator, batch_masks, block_mask
from heliostat.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.npz"


def test_the_number_of_masked_patches_matches_the_reference() -> None:
    rng = np.random.default_rng(0)
    for requested, mean, smallest, largest in np.load(GOLDEN)["mask_stats"]:
        counts = [int(block_mask((16, 16), int(requested), rng).sum()) for _ in range(600)]
        assert abs(np.mean(counts) - mean) < 0.15
        assert smallest - 3 <= min(counts) <= max(counts) <= largest


def test_masks_are_blocks_not_scattered_patches() -> None:
    rng = np.random.default_rng(1)
    masks = np.stack([block_mask((16, 16), 64, rng) for _ in range(100)])
    with_masked_neighbour = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, 1:].sum()
    assert with_masked_neighbour > 0.6  # scattered patches would reach 0.25


def test_half_of_the_crops_are_masked_with_stratified_ratios() -> None:
    counts = np.stack([batch_masks(MaskSettings(14), (16, 16), 32, seed=0, step=step).sum(axis=1) for step in range(40)])
    assert ((counts > 0).sum(axis=1) == 32).all()
    assert abs(counts.mean() / 256 - 0.149) < 0.002  # measured on the reference
    ordered = np.sort(counts, axis=1)[:, 32:] / 256
    edges = np.linspace(0.1, 0.5, 33)
    assert (ordered <= edges[1:]).all()
    assert (ordered >= edges[:-1] - 8 / 256).all()
    assert (counts > 0).mean(axis=0).min() > 0.2  # every place in the batch gets its share


def test_masks_are_a_pure_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> bytes:
        return batch_masks(MaskSettings(14), (14, 14), 8, seed=seed, step=step).tobytes()

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(0, 2), draw(1, 0)}) == 3
    np.random.seed(0)
    before = draw(1, 2)
    np.random.seed(1)
    assert draw(1, 2) == before


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_draw_their_rows_of_the_whole_batch(num_ranks: int) -> None:
    whole = batch_masks(MaskSettings(14), (16, 16), 8, seed=3, step=5).reshape(2, 8, 256)
    share = 8 // num_ranks
    for rank in range(num_ranks):
        own = range(rank * share, (rank + 1) * share)
        masks = batch_masks(MaskSettings(14), (16, 16), 8, seed=3, step=5, own=own)
        assert (masks.reshape(2, share, 256) == whole[:, own.start : own.stop]).all()


@pytest.mark.parametrize(("grid", "largest"), [(7, 21), (16, 128), (37, 666)])
def test_no_block_covers_more_than_half_of_the_grid_as_the_reference_rounds_it(grid: int, largest: int) -> None:
    rng = np.random.default_rng(0)
    first_blocks = []
    for _ in range(400):
        mask = np.zeros((grid, grid), dtype=np.bool_)
        first_blocks.append(_add_block(mask, grid // 2 * grid, rng))
    assert max(first_blocks) <= largest == grid // 2 * grid


def test_no_two_draws_share_a_stream() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**32, 0, 0), (0, 2**32, 0), (0, 1, 1)]
    assert len({_generator(*key).bytes(16) for key in keys}) == len(keys)


def test_no_two_crops_of_a_batch_have_the_same_mask() -> None:
    masks = batch_masks(MaskSettings(14, (0.3, 0.4), 1.0), (16, 16), 32, seed=0, step=0)
    assert len({mask.tobytes() for mask in masks}) == 64


@pytest.mark.parametrize("grid_hw", [(1, 1), (2, 2), (4, 4), (3, 9)])
def test_tiny_grids_end_with_at_most_the_requested_patches(grid_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    for num_masked in range(grid_hw[0] * grid_hw[1] + 1):
        assert block_mask(grid_hw, num_masked, rng).sum() <= num_masked


def test_no_probability_and_no_ratio_mean_no_masks() -> None:
    assert not batch_masks(MaskSettings(8, (0.1, 0.5), 0.0), (4, 4), 4, seed=0, step=0).any()
    assert not batch_masks(MaskSettings(8, (0.0, 0.0), 1.0), (4, 4), 4, seed=0, step=0).any()


def test_settings_that_fit_no_crop_are_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match="not divisible by patch_size 14; use 210"):
        MaskSettings(14).grid(220)
    with pytest.raises(ConfigError, match="must rise"):
        MaskSettings(14, mask_ratio_min_max=(0.5, 0.1))
    with pytest.raises(ConfigError, match="mask_sample_probability"):
        MaskSettings(14, mask_sample_probability=2.0)
