"""Table 15: our rules give its numbers, and any composition prints like it."""

import pytest

from heliostat.curation.composition import LVD_142M, LVD_142M_IMAGES, CompositionRow, composition_table, final_images, total_row

PUBLISHED_FINAL = [
    14_197_086, 56_788_344, 40_997_344, *[1_000_000] * 13, 1_434_262, *[1_000_000] * 3, 1_580_470, 6_321_880, 960_000, 830_000,
    *[1_000_000] * 3,
]  # fmt: skip


def test_the_rules_give_every_published_final_value_and_the_total() -> None:
    assert [row.final for row in LVD_142M] == PUBLISHED_FINAL
    assert total_row(LVD_142M)["final"] == LVD_142M_IMAGES == 142_109_386
    assert [row.retrieved for row in LVD_142M if row.mode == "sample"] == [56_788_344, 40_997_344, 6_321_880]


def test_every_published_cluster_count_is_a_multiple_of_the_images_per_cluster() -> None:
    assert all(row.retrieved % 10_000 == 0 for row in LVD_142M if row.mode == "cluster")


@pytest.mark.parametrize(
    ("mode", "settings", "expected"),
    [
        ("as is", {"images": 7}, 7),
        ("sample", {"images": 7, "neighbors": 32}, 224),
        ("sample", {"images": 7, "neighbors": 32, "max_images": 100}, 100),
        ("cluster", {"images": 7, "retrieved": 0, "max_images": 100}, 0),
        ("cluster", {"images": 7, "retrieved": 99, "max_images": 100}, 99),
        ("cluster", {"images": 7, "retrieved": 101, "max_images": 100}, 100),
    ],
)
def test_final_is_the_product_or_the_draw_under_the_cap(mode: str, settings: dict[str, int], expected: int) -> None:
    assert final_images(mode, **settings) == expected


def test_a_composition_prints_as_a_table_with_its_total() -> None:
    rows = [
        CompositionRow("birds", 1200, "as is", None, 1200, 1200),
        CompositionRow("birds", 1200, "sample", 4800, 4500, 4500),
        CompositionRow("cars", 80, "cluster", 20_000, 10_000, 9_990),
    ]
    assert composition_table(rows) == (
        "dataset  images  mode     retrieved   final   added\n"
        "---------------------------------------------------\n"
        "birds     1 200  as is            -   1 200   1 200\n"
        "birds     1 200  sample       4 800   4 500   4 500\n"
        "cars         80  cluster     20 000  10 000   9 990\n"
        "---------------------------------------------------\n"
        "total                                15 700  15 690\n"
    )
