"""The demo's pool holds what its truth says: crops, tiles and their copies, hard negatives, an evaluation set, broken files."""

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from heliostat.data.config import DecodeConfig, PhotographPoolConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.data.hard_negatives import DRAWN_KINDS
from heliostat.data.photograph_pool import write_evaluation, write_pool, write_suite
from heliostat.data.photographs import PHOTOGRAPH_NAMES, REGIONS, VIDEO_NAMES, photograph
from heliostat.data.planted_copies import TEXTURES, TRANSFORMS, planted_tiles
from heliostat.data.sources import open_source
from heliostat.errors import DataError

SMALL_POOL = PhotographPoolConfig(
    seed=3,
    crops_per_photograph=12,
    num_tiles=40,
    copies_per_kind=3,
    num_evaluation_tiles=5,
    evaluation_copies_per_kind=2,
    hard_negatives_per_kind=4,
    num_video_frames=12,
    num_broken_files=20,
)


def list_images(folder: Path) -> list[Path]:
    return [folder / key for key in open_source(str(folder)).keys]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool") / "raw"
    write_pool(folder, SMALL_POOL)
    return folder


@pytest.fixture(scope="module")
def truth(pool: Path) -> dict:
    return json.loads((pool / "truth.json").read_text())


def pixels(path: Path) -> np.ndarray:
    return decode(path.read_bytes(), DecodeConfig())


def test_the_pool_holds_what_its_truth_says(pool: Path, truth: dict) -> None:
    files = {str(path.relative_to(pool)) for path in list_images(pool)}
    crops = {file for file in files if file.startswith("crops/")}
    tiles = {file for file in files if file.startswith("tiles/")}
    planted = {copy["file"] for copy in truth["planted"]}
    evaluation = {copy["file"] for copy in truth["evaluation"]}
    negatives = {file for group in truth["hard_negatives"] for file in group["files"]}
    video = {file for name in VIDEO_NAMES for file in truth["video"][name]}
    assert (len(crops), len(tiles), len(video), len(truth["broken"])) == (17 * 12, 40, 12, 20)
    assert files == crops | tiles | planted | evaluation | negatives | video | set(truth["broken"])
    kinds = Counter(copy["kind"] for copy in truth["planted"])
    assert kinds == {**dict.fromkeys(TRANSFORMS, 3), "exact": round(0.03 * 204)}
    assert Counter(copy["kind"] for copy in truth["evaluation"]) == dict.fromkeys(TRANSFORMS, 2)
    assert {copy["original"] for copy in truth["planted"] if copy["kind"] != "exact"} == tiles
    assert truth["labels"]["crops/coins/000003.png"] == "coins"
    assert set(truth["labels"]) == crops | tiles | planted | evaluation
    assert truth["frames_apart"] == 48


def test_hard_negatives_are_all_tiles_by_photograph_and_the_drawn_groups(truth: dict) -> None:
    kinds = Counter(group["kind"] for group in truth["hard_negatives"])
    assert {kind: kinds[kind] for kind in DRAWN_KINDS} == dict.fromkeys(DRAWN_KINDS, 1)
    tiles = [group for group in truth["hard_negatives"] if group["kind"].endswith("_tile")]
    assert sum(len(group["files"]) for group in tiles) == 40
    for group in tiles:
        (name,) = {truth["labels"][file] for file in group["files"]}
        assert (group["kind"] == "texture_tile") == (name in TEXTURES)


def test_identical_and_exact_copies_and_no_others_have_the_bytes_of_their_original(pool: Path, truth: dict) -> None:
    for copy in truth["planted"]:
        same = (pool / copy["file"]).read_bytes() == (pool / copy["original"]).read_bytes()
        assert same == (copy["kind"] in {"exact", "identical"}), copy


def test_copies_without_a_change_of_place_look_like_their_originals(pool: Path, truth: dict) -> None:
    for copy in truth["planted"]:
        if copy["kind"] in {"exact", "identical", "reencode", "resize", "crop_95", "flip", "blur", "grey", "noise", "aspect"}:
            one, two = (
                cv2.resize(pixels(pool / copy[key]), (16, 16), interpolation=cv2.INTER_AREA).mean(axis=-1)
                for key in ("file", "original")
            )
            one = one[:, ::-1] if copy["kind"] == "flip" else one
            if two.std() > 5:
                assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.6, copy


def test_no_file_shows_a_pixel_of_the_right_halves_and_boxes_say_where_it_was_cut(pool: Path, truth: dict) -> None:
    assert {file.split("/")[0] for file in truth["boxes"]} == {"crops", "tiles", "hard_negatives"}
    for file, (label, left, top, side) in {**truth["boxes"], **truth["evaluation_boxes"]}.items():
        image = photograph(PHOTOGRAPH_NAMES[label])
        assert 0 <= left <= round(REGIONS["left"][1] * image.shape[1]) - side
        if file.startswith(("crops/", "tiles/")):
            assert (pixels(pool / file) == image[top : top + side, left : left + side]).all()


def test_the_evaluation_set_is_in_the_pool_only_as_copies(pool: Path, truth: dict, tmp_path: Path) -> None:
    written = write_evaluation(tmp_path, SMALL_POOL)
    files = {str(path.relative_to(tmp_path)) for path in list_images(tmp_path)}
    assert files == set(written) == set(truth["evaluation_boxes"]) == {copy["reference"] for copy in truth["evaluation"]}
    assert len(files) == 5
    places = {tuple(box) for file, box in truth["boxes"].items() if not file.startswith("crops/")}
    assert not places & {tuple(box) for box in truth["evaluation_boxes"].values()}
    for copy in truth["evaluation"]:
        same = (pool / copy["file"]).read_bytes() == (tmp_path / copy["reference"]).read_bytes()
        assert same == (copy["kind"] == "identical")


def test_broken_files_and_only_they_are_rejected(pool: Path, truth: dict) -> None:
    rejected = {}
    for path in list_images(pool):
        try:
            pixels(path)
        except ImageRejected as error:
            rejected[str(path.relative_to(pool))] = error.reason
    assert set(rejected) == set(truth["broken"])
    assert set(rejected.values()) == {"truncated", "unknown_format", "too_many_pixels"}


def test_the_pool_is_deterministic_and_never_overwrites(pool: Path, tmp_path: Path) -> None:
    write_pool(tmp_path / "again", SMALL_POOL)
    for path in pool.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(pool)).read_bytes()
    with pytest.raises(DataError, match="not empty"):
        write_pool(pool, SMALL_POOL)


def test_the_suite_can_be_left_out_and_asking_for_too_many_tiles_is_refused(tmp_path: Path) -> None:
    nothing = {"copies_per_kind": 0, "num_evaluation_tiles": 0, "evaluation_copies_per_kind": 3, "hard_negatives_per_kind": 0}
    config = PhotographPoolConfig(crops_per_photograph=1, exact_duplicate_ratio=0, num_tiles=1, num_video_frames=0, **nothing)
    truth = write_pool(tmp_path / "bare", config)
    assert truth["planted"] == truth["evaluation"] == []
    assert [len(group["files"]) for group in truth["hard_negatives"]] == [1]
    assert write_evaluation(tmp_path / "evaluation", config) == {}
    with pytest.raises(DataError, match="num_tiles 500, num_evaluation_tiles 16 and hard_negatives_per_kind 12 make more than"):
        write_pool(tmp_path / "large", PhotographPoolConfig(crops_per_photograph=1, num_tiles=500))


def test_the_default_pool_stays_small(tmp_path: Path) -> None:
    config = PhotographPoolConfig(crops_per_photograph=1, num_video_frames=0, num_broken_files=0)
    write_pool(tmp_path / "pool", config)
    num_files = len(list_images(tmp_path / "pool")) - 17 - round(0.03 * 17)
    assert num_files == 106 + 20 * 30 + 20 * 8 + 3 * 12
    assert sum(path.stat().st_size for path in list_images(tmp_path / "pool")) < 25e6


def test_a_suite_of_any_tiles_plants_every_kind_on_every_original(tmp_path: Path) -> None:
    tiles = [tile for tile in planted_tiles("right") if tile.name in {"brick", "coins"}]
    truth = write_suite(tmp_path / "suite", tiles, seed=1, num_negatives=3)
    num_originals = len(tiles) - 3
    assert Counter(copy["kind"] for copy in truth["planted"]) == dict.fromkeys(TRANSFORMS, num_originals)
    pairs = {(copy["original"], copy["kind"]) for copy in truth["planted"]}
    assert len(pairs) == num_originals * len(TRANSFORMS)
    files = {str(path.relative_to(tmp_path / "suite")) for path in list_images(tmp_path / "suite")}
    assert files == {file for copy in truth["planted"] for file in (copy["file"], copy["original"])} | {
        file for group in truth["hard_negatives"] for file in group["files"]
    }
    few = write_suite(tmp_path / "few", tiles, seed=1, num_negatives=3, per_kind=1)
    assert len(few["planted"]) == len(TRANSFORMS)
    with pytest.raises(DataError, match="3 tiles are too few for 3 cards"):
        write_suite(tmp_path / "none", tiles[:3], seed=1, num_negatives=3)
