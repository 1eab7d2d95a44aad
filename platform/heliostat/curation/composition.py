"""What each curated set brought into the training set: table 15 of DINOv2 for any composition."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Mode = Literal["as is", "sample", "cluster"]

# Shapes: none.


class CompositionRow(NamedTuple):
    """One way in which one curated set contributed.

    dataset: its name; images: curated images; mode: how they were used. retrieved: pool images its images or matched clusters
    brought, counted once per image that reached them, None when the images went in as they are. final: what remains of them,
    each counted once, under the set's cap. added: of those, the ones that no row before had brought.
    """

    dataset: str
    images: int
    mode: Mode
    retrieved: int | None
    final: int
    added: int


def final_images(
    mode: Mode, *, images: int, neighbors: int = 4, retrieved: int | None = None, max_images: int | None = None
) -> int:
    """The `Final` column of table 15, were there no collisions.

    `as is`: the images themselves; `sample`: neighbors x images; `cluster`: what the matched clusters gave; the latter two up
    to `max_images`.
    """
    if mode == "as is":
        return images
    count = neighbors * images if mode == "sample" else (retrieved or 0)
    return count if max_images is None else min(count, max_images)


def total_row(rows: Sequence[CompositionRow]) -> Mapping[str, int]:
    """`final`: the sum of the column, as table 15 has it; `images`: the distinct images that all rows brought."""
    return {"final": sum(row.final for row in rows), "images": sum(row.added for row in rows)}


def composition_table(rows: Sequence[CompositionRow]) -> str:
    """The rows as text, numbers right-aligned, with the total below."""
    total = total_row(rows)
    header = ("dataset", "images", "mode", "retrieved", "final", "added")
    lines = [header, *(_cells(row) for row in rows), ("total", "", "", "", _number(total["final"]), _number(total["images"]))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = (False, True, False, True, True, True)
    text = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in lines
    ]
    rule = "-" * len(text[0])
    return "\n".join(line.rstrip() for line in [text[0], rule, *text[1:-1], rule, text[-1]]) + "\n"


def _cells(row: CompositionRow) -> tuple[str, str, str, str, str, str]:
    retrieved = "-" if row.retrieved is None else _number(row.retrieved)
    return row.dataset, _number(row.images), row.mode, retrieved, _number(row.final), _number(row.added)


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _published(
    dataset: str,
    images: int,
    mode: Mode,
    retrieved: int | None = None,
    *,
    neighbors: int = 4,
    max_images: int | None = 1_000_000,
) -> CompositionRow:
    if mode == "sample":
        retrieved, max_images = neighbors * images, None
    final = final_images(mode, images=images, neighbors=neighbors, retrieved=retrieved, max_images=max_images)
    return CompositionRow(dataset, images, mode, retrieved, final, final)


LVD_142M = (
    _published("ImageNet-22k", 14_197_086, "as is"),
    _published("ImageNet-22k", 14_197_086, "sample"),
    _published("ImageNet-1k train", 1_281_167, "sample", neighbors=32),
    _published("Caltech 101", 3_030, "cluster", 2_630_000),
    _published("CUB-200-2011", 5_994, "cluster", 1_300_000),
    _published("DTD train1", 1_880, "cluster", 1_580_000),
    _published("FGVC-Aircraft", 3_334, "cluster", 1_170_000),
    _published("Flowers-102", 1_020, "cluster", 1_060_000),
    _published("Food-101", 75_750, "cluster", 21_670_000),
    _published("Oxford-IIIT Pet trainval", 3_680, "cluster", 2_750_000),
    _published("Stanford Cars", 8_144, "cluster", 7_220_000),
    _published("SUN397 train1", 19_850, "cluster", 18_950_000),
    _published("Pascal VOC 2007 train", 2_501, "cluster", 1_010_000),
    _published("ADE20K train", 20_210, "cluster", 20_720_000),
    _published("Cityscapes train", 2_975, "cluster", 1_390_000),
    _published("Pascal VOC 2012 seg trainaug", 1_464, "cluster", 10_140_000),
    _published("Mapillary SLS train", 1_434_262, "as is"),
    _published("KITTI train (Eigen)", 23_158, "cluster", 3_700_000),
    _published("NYU Depth V2 train", 24_231, "cluster", 10_850_000),
    _published("SUN RGB-D train", 4_829, "cluster", 4_870_000),
    _published("Google Landmarks v2 (clean)", 1_580_470, "as is"),
    _published("Google Landmarks v2 (clean)", 1_580_470, "sample"),
    _published("AmsterTime new", 1_231, "cluster", 960_000),
    _published("AmsterTime old", 1_231, "cluster", 830_000),
    _published("Met train", 397_121, "cluster", 62_860_000),
    _published("Revisiting Oxford base", 4_993, "cluster", 3_680_000),
    _published("Revisiting Paris base", 6_322, "cluster", 3_660_000),
)
"""Table 15 of arXiv 2304.07193: `images`, `mode` and, for clusters, `retrieved` as published; the rest follows from the
rules."""

LVD_142M_IMAGES = 142_109_386
"""Its published total."""
