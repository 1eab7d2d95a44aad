"""The reference pages are what the code would write today."""

import runpy
from pathlib import Path

import pytest

from heliostat.config import walk_fields
from heliostat.metrics import METRICS
from heliostat.runtime.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs"
GENERATOR = runpy.run_path(str(DOCS / "generate_reference.py"))


@pytest.mark.parametrize("name", GENERATOR["PAGES"])
def test_a_reference_page_is_fresh(name: str) -> None:
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == GENERATOR["PAGES"][name](), f"stale; run `python docs/generate_reference.py`: {name}"


def test_every_key_of_a_recipe_has_a_meaning() -> None:
    assert [key for key, field in walk_fields(Recipe) if not field.description] == []


def test_every_key_is_on_the_page_or_said_to_be_that_of_pretrain() -> None:
    page = (DOCS / "reference" / "recipe_keys.md").read_text(encoding="utf-8")
    for key, _ in walk_fields(Recipe):
        first, _, rest = key.partition(".")
        assert f"| `{key}` |" in page or (first == "distill" and f"| `pretrain.{rest}` |" in page) or f"\n## {key}\n" in page, (
            key
        )


def test_every_metric_is_on_its_page() -> None:
    page = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"| `{name}` |" not in page] == []
