"""The demo's photographs are all there, and its crops never leave their region."""

import importlib.util
import socket
from pathlib import Path

import numpy as np
import pytest

from heliostat.data.config import DecodeConfig
from heliostat.data.decode import decode
from heliostat.data.photographs import (
    PHOTOGRAPH_NAMES,
    REGIONS,
    Region,
    crops,
    photograph,
    photographs,
    video_frames,
    write_crops,
    write_whole,
)
from heliostat.data.sources import open_source
from heliostat.errors import DataError


def list_images(folder: Path) -> list[Path]:
    return [folder / key for key in open_source(str(folder)).keys]


def _refuse_network(*_: object) -> None:
    raise AssertionError("the network was used")


def test_there_are_17_photographs_of_200_pixels_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph.cache_clear()
    monkeypatch.setattr(socket, "create_connection", _refuse_network)
    found = photographs()
    assert tuple(found) == PHOTOGRAPH_NAMES
    assert len(found) == 17
    for image in found.values():
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert min(image.shape[:2]) >= 200
    for name in ("camera", "coins", "moon"):
        assert (found[name][..., 0] == found[name][..., 2]).all()


def test_a_missing_package_names_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r'run: pip install "heliostat\[demo\]"'):
        photograph("astronaut")


def test_an_unknown_photograph_is_refused() -> None:
    with pytest.raises(DataError, match="astronaut"):
        photograph("lenna")


@pytest.mark.parametrize("region", REGIONS)
def test_crops_stay_inside_their_region(region: Region) -> None:
    cut = crops(region, count=20, seed=1)
    assert len(cut) == 17 * 20
    for crop in cut:
        image, side = photograph(crop.name), crop.pixels.shape[0]
        first, last = REGIONS[region]
        assert crop.pixels.shape == (side, side, 3)
        assert 48 <= side <= 96
        assert round(first * image.shape[1]) <= crop.left <= round(last * image.shape[1]) - side
        assert (crop.pixels == image[crop.top : crop.top + side, crop.left : crop.left + side]).all()
        assert PHOTOGRAPH_NAMES[crop.label] == crop.name


def test_train_test_and_inner_regions_share_no_column() -> None:
    assert REGIONS["left"][1] < REGIONS["right"][0]
    assert REGIONS["fit"][1] < REGIONS["validate"][0]
    assert REGIONS["validate"][1] == REGIONS["left"][1]


def test_crops_are_deterministic_and_independent_of_each_other() -> None:
    whole = crops("left", count=5, seed=2)
    alone = crops("left", count=5, seed=2, name="coins")
    assert [(crop.left, crop.top) for crop in alone] == [(crop.left, crop.top) for crop in whole if crop.name == "coins"]
    assert [crop.top for crop in alone] != [crop.top for crop in crops("left", count=5, seed=3, name="coins")]


def test_video_frames_are_consecutive_and_alike() -> None:
    frames = video_frames(9)
    assert [name for name, _ in frames] == ["bikes"] * 5 + ["bigbuckbunny"] * 4
    assert frames[0][1].shape == (272, 640, 3)
    assert frames[-1][1].shape == (720, 1280, 3)
    assert 0 < np.abs(frames[0][1].astype(int) - frames[1][1]).mean() < 20
    with pytest.raises(DataError, match=r"bigbuckbunny\.mp4 gives 132 frames"):
        video_frames(300)


def test_crops_and_whole_photographs_are_written_losslessly(tmp_path: Path) -> None:
    written = write_crops(tmp_path / "heldout", "right", count=2, seed=4)
    assert [str(path.relative_to(tmp_path / "heldout")) for path in list_images(tmp_path / "heldout")] == sorted(written)
    assert len(written) == 34
    for file, crop in written.items():
        assert file.startswith(crop.name)
        assert (decode((tmp_path / "heldout" / file).read_bytes(), DecodeConfig()) == crop.pixels).all()
    write_whole(tmp_path / "whole")
    assert [path.name for path in list_images(tmp_path / "whole")] == [f"{name}.png" for name in PHOTOGRAPH_NAMES]
    assert (decode((tmp_path / "whole" / "retina.png").read_bytes(), DecodeConfig()) == photograph("retina")).all()
