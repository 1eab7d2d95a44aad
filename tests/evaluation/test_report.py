"""The page shows what it is given, loads nothing, and no name can become markup."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from heliostat.artifacts import ArtifactRecord
from heliostat.evaluation.report import ReportInputs, accuracy_bars, loss_curves, render_report

HOSTILE = "<script>alert('x')</script>\"&$a_{b$ {{ 7 * 7 }} ]]>"


def row(name: str, **changes) -> dict:
    return {
        "name": name,
        "version": "colour",
        "knn": 0.5,
        "linear": 0.25,
        "knn_std": 0.0,
        "linear_std": 0.0,
        "num_seeds": 1,
    } | changes


def inputs(name: str = "teacher") -> ReportInputs:
    margin = {
        "name": name,
        "version": "colour",
        "num_seeds": 3,
        "above_random_points": -1.25,
        "spread_points": 0.5,
        "above_best_baseline_points": 12.0,
        "best_baseline": name,
    }
    history = [{"step": step, "train/loss": 10.0 / step, "train/ibot": 1.0} for step in (1, 2, 3)]
    record = ArtifactRecord(
        kind="raw", name="own", version="1", fingerprint="f", counts={name: 12345}, inputs={name: name}, created=name
    )
    return ReportInputs(
        title=name,
        results={
            "rows": [row("random weights", num_seeds=3, knn_std=0.031), row(name)],
            "margins": [margin],
            "scratch_lines": [],
        },
        pictures={"pca": b"\x89PNG-one", "neighbors": b"\x89PNG-two"},
        histories={"model": history, "student": history},
        funnel=[{"stage": name, "rows_in": 5000, "rows_kept": 4999, "dropped_by_reason": {name: 1}}],
        copies={"recall": 0.9, "precision": 0.8, "num_found": 9, "num_planted": 10, "recall_by_kind": {name: 0.5}},
        records={name: record},
        trials=[{"name": name, "overrides": {name: name}, "value": 0.5, "status": "stopped", "step": 50}],
    )


class Tags(HTMLParser):
    """Collects tags, and the places that a page would load from."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_names_from_recipes_and_folders_never_become_markup() -> None:
    plain, hostile = parse(render_report(inputs())), parse(render_report(inputs(HOSTILE)))
    assert hostile.tags == plain.tags
    assert "script" not in hostile.tags
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|\b49\b", render_report(inputs(HOSTILE)))


def test_nothing_is_loaded_from_elsewhere() -> None:
    tags = parse(render_report(inputs()))
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in tags.sources), tags.sources
    assert tags.tags.count("svg") == 2
    assert tags.tags.count("img") == 2


def test_the_page_shows_the_numbers() -> None:
    page = render_report(inputs())
    for shown in (
        "50.0",
        "± 3.1",
        "-1.2 ± 0.5 points",
        "+12.0 points",
        "4,999",
        "12,345",
        "recall 0.900",
        "stopped at step 50",
    ):
        assert shown in page, shown


def test_a_page_without_curation_sweep_and_pictures_is_shorter_and_still_whole() -> None:
    full = inputs()
    page = render_report(ReportInputs(full.title, full.results, {}, full.histories))
    for heading in ("Curation", "Trials", "Patch tokens", "Nearest neighbours"):
        assert f"<h2>{heading}</h2>" not in page
    assert "<h2>Accuracy</h2>" in page


@pytest.mark.parametrize("name", ["teacher", HOSTILE, "$", "a$b$c", "x_{1", "±", "\\frac"])
def test_every_name_can_be_drawn_and_the_drawing_is_valid_xml(name: str) -> None:
    svg = accuracy_bars([row(name), row("random weights", version="grey")])
    root = ElementTree.fromstring(svg)
    assert f"{name} (colour)" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_rows_of_the_same_name_are_drawn_as_two_bars() -> None:
    one, two = (accuracy_bars([row("trials")] * count) for count in (1, 2))
    assert two.count("trials (colour)") == 2 * one.count("trials (colour)")


def test_the_drawings_are_the_same_every_time() -> None:
    assert accuracy_bars([row("teacher")]) == accuracy_bars([row("teacher")])
    history = {"model": [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}]}
    assert loss_curves(history) == loss_curves(history)


def test_a_run_without_records_has_an_empty_panel() -> None:
    ElementTree.fromstring(loss_curves({"model": []}))
