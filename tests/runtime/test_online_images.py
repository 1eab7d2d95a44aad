"""Which images an evaluation looks at: the same ones whatever the order, as many of each class, none lost in silence."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from tiny_training import SETTINGS, SHARD

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.config import validate
from heliostat.data.photographs import crops
from heliostat.data.shards import make_shard_image, manifest_rows, manifest_to_bytes, write_shard
from heliostat.errors import ArtifactNotFoundError, DataError
from heliostat.runtime.online_images import OnlineDraw, decode_drawn, draw_images, rows_in_turn, smallest_hashes
from heliostat.runtime.pipelines import Context
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.stage_ingest import MANIFEST
from heliostat.runtime.training_data import training_data


def png(pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert done
    return data.tobytes()


def cut_png(seed: int) -> bytes:
    """A header that can be read, and half of the pixels."""
    whole = png(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8))
    return whole[: len(whole) // 2]


def shard_images(count: int, *, with_labels: bool = True, names: slice = slice(None)) -> list:
    found = crops("left", count=count, seed=0)
    kept = set(sorted({crop.name for crop in found})[names])
    return [
        make_shard_image(png(crop.pixels), "png", f"{crop.name}/{number}.png", label=crop.name if with_labels else None)
        for number, crop in enumerate(found)
        if crop.name in kept
    ]


class Store:
    """A store, and what was said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, io.StringIO()

    def context(self, **online: Any) -> Context:
        section = SETTINGS | {"data": "raw/tiny@1", "online": online}
        ingest = {"pool": "photographs", "labelled": "photographs"}
        plain = {"name": "tiny", "store": str(self.folder), "tracking": {"uri": "none"}, "pretrain": section, "ingest": ingest}
        return Context(validate(Recipe, plain, "tiny"), Progress(self.said))

    def images(self, name: str, images: list) -> Artifact:
        tar = write_shard(images)
        draft = self.context().artifacts.begin(ArtifactRef("raw", name, "1"), config={"images": name}, inputs={}, notify=print)
        assert isinstance(draft, Draft)
        draft.put(SHARD, tar)
        draft.put(MANIFEST, manifest_to_bytes(manifest_rows(SHARD, tar)))
        return draft.commit(counts={"images": len(images)})

    def draw(self, **online: Any) -> OnlineDraw:
        context = self.context(**online)
        section = context.recipe.pretrain
        assert section is not None
        found = draw_images(context, section, training_data(context, section.data).sources())
        assert found is not None
        return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.images("tiny", shard_images(3, with_labels=False))
    made.images("tiny-labelled", shard_images(12))
    return made


def test_half_are_of_the_training_set_and_half_are_labelled_evenly(store: Store) -> None:
    draw = store.draw(max_images=70)
    assert (len(draw.training), len(draw.labelled)) == (35, 35)
    counts = [sum(one.label == label for one in draw.labelled) for label in {one.label for one in draw.labelled}]
    assert (len(counts), min(counts), max(counts), draw.num_classes) == (3, 11, 12, 17)
    assert draw.line() == "35 of raw/tiny-labelled@1 (3 of 17 classes), 35 of the training set"
    assert len(draw.pictures) == 6


def test_all_classes_are_drawn_where_each_can_have_ten_images(store: Store) -> None:
    draw = store.draw(max_images=400)
    counts = [sum(one.label == label for one in draw.labelled) for label in {one.label for one in draw.labelled}]
    assert (len(counts), min(counts), max(counts)) == (17, 11, 12)
    assert draw.line() == "200 of raw/tiny-labelled@1 (17 classes), 51 of the training set"


def test_the_same_images_are_drawn_whatever_the_order_of_the_data(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    other.images("tiny", shard_images(3, with_labels=False)[::-1])
    other.images("tiny-labelled", shard_images(12)[::-1])
    ours, theirs = (decode_drawn(one.draw(max_images=40), print) for one in (store, other))
    np.testing.assert_array_equal(ours.training_NSSC, theirs.training_NSSC)
    assert ours.labelled is not None
    assert theirs.labelled is not None
    np.testing.assert_array_equal(ours.labelled.crops_NSSC, theirs.labelled.crops_NSSC)
    np.testing.assert_array_equal(ours.labelled.labels_N, theirs.labelled.labels_N)


def test_crops_have_the_size_of_the_trainings_or_the_one_that_is_asked_for(store: Store) -> None:
    assert decode_drawn(store.draw(max_images=40), print).training_NSSC.shape == (20, 32, 32, 3)
    images = decode_drawn(store.draw(max_images=40, image_size=48), print)
    assert images.labelled is not None
    assert images.labelled.crops_NSSC.shape == (20, 48, 48, 3)


def test_a_recipe_without_its_labelled_set_goes_without_labels_and_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.images("tiny", shard_images(3, with_labels=False))
    draw = store.draw(max_images=40)
    assert draw.labelled == ()
    assert "no raw/tiny-labelled@1 in the store: evaluations go without labels" in store.said.getvalue()
    assert draw.line() == "20 of the training set; no labels, so no k-NN and no probe"
    assert decode_drawn(draw, print).labelled is None


def test_a_set_that_is_named_must_be_there_and_be_of_use(store: Store) -> None:
    with pytest.raises(ArtifactNotFoundError, match="raw/nowhere@1"):
        store.draw(labelled="raw/nowhere@1")
    with pytest.raises(DataError, match=r"51 of 51 images of raw/tiny@1 have no label; lay images in one folder per class"):
        store.draw(labelled="raw/tiny@1")
    store.images("one-class", shard_images(4, names=slice(1)))
    with pytest.raises(DataError, match=r"4 images of raw/one-class@1 have 1 classes; k-NN and probe need 2 classes"):
        store.draw(labelled="raw/one-class@1")


def test_an_evaluation_that_is_off_draws_nothing(store: Store) -> None:
    context = store.context(enabled=False)
    assert context.recipe.pretrain is not None
    assert draw_images(context, context.recipe.pretrain, ()) is None


def test_what_does_not_decode_is_left_out_and_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.images("tiny", [*shard_images(1, with_labels=False), make_shard_image(cut_png(0), "png", "broken.png")])
    said: list[str] = []
    images = decode_drawn(store.draw(max_images=100, num_pictures=0), said.append)
    assert len(images.training_NSSC) == 17
    assert said == ["evaluation: 1 of 18 drawn images are left out: 1 truncated"]


def test_a_training_set_of_broken_images_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.images("tiny", [make_shard_image(cut_png(seed), "png", f"{seed}.png") for seed in range(3)])
    with pytest.raises(DataError, match="0 of 3 images of the training set could be decoded"):
        decode_drawn(store.draw(max_images=20), print)


def test_the_smallest_hashes_come_first() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (500, 32), np.uint8)
    expected = sorted(range(500), key=lambda row: bytes(ids[row]))
    assert smallest_hashes(ids, 40) == expected[:40]
    assert smallest_hashes(ids, 900) == expected


def test_every_label_has_its_turn_before_one_has_a_second() -> None:
    assert rows_in_turn(["a", "a", "a", "b", "a", "c"], 4) == [0, 1, 3, 5]
    assert rows_in_turn(["a", "b"], 9) == [0, 1]
