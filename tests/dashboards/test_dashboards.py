"""The Grafana dashboard draws exactly the live metrics, and Prometheus looks where Ray writes its targets."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.metrics import live_metrics

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
LIVE = {metric.prometheus_name for metric in live_metrics()}
EVERY_LIVE_METRIC = '{__name__=~"ray_heliostat_.+"}'


@pytest.fixture
def dashboard() -> dict[str, Any]:
    return json.loads((DASHBOARDS / "grafana" / "heliostat.json").read_text())


def drawn(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(panel title, PromQL), rows' inner panels excluded because the dashboard has none."""
    for panel in drawn(dashboard):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def names_in(expression: str) -> set[str]:
    """Everything in a PromQL expression that can be a metric: an identifier outside braces, strings and function calls."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\b(?:by|without)\s*\([^)]*\)', " ", expression)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w)(?!\s*\()", bare))


def problems(dashboard: dict[str, Any]) -> list[str]:
    found = [
        f"{title}: {name} is not a live metric"
        for title, expression in expressions(dashboard)
        for name in sorted(names_in(expression) - LIVE)
    ]
    everything = set().union(*(names_in(expression) for _, expression in expressions(dashboard)))
    return found + [f"{name} is drawn nowhere" for name in sorted(LIVE - everything)]


def test_every_panel_draws_metrics_that_exist_and_every_live_metric_is_drawn(dashboard: dict[str, Any]) -> None:
    assert problems(dashboard) == []


def test_a_wrong_metric_name_and_a_metric_that_nobody_draws_are_caught(dashboard: dict[str, Any]) -> None:
    wrong = copy.deepcopy(dashboard)
    target = next(target for panel in drawn(wrong) for target in panel["targets"] if "train_grad_norm" in target["expr"])
    target["expr"] = target["expr"].replace("grad_norm", "gradient_norm")
    assert problems(wrong) == [
        "Gradient norm: ray_heliostat_train_gradient_norm is not a live metric",
        "ray_heliostat_train_grad_norm is drawn nowhere",
    ]
    unrelated = copy.deepcopy(dashboard)
    drawn(unrelated)[0]["targets"][0]["expr"] += " + up"
    assert problems(unrelated) == ["Loss: up is not a live metric"]


def test_every_expression_follows_the_chosen_artifact_and_its_brackets_close(dashboard: dict[str, Any]) -> None:
    for title, expression in expressions(dashboard):
        assert expression.count('{artifact=~"$artifact"}') == len(re.findall("ray_heliostat_", expression)), title
        assert all(expression.count(opening) == expression.count(closing) for opening, closing in ("()", "{}")), title


def test_panels_have_unique_ids_do_not_overlap_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells, panel["title"]
        cells |= own
    assert all(panel["description"] for panel in drawn(dashboard))


def test_the_data_source_is_chosen_by_the_reader_and_never_fixed(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["artifact"]["definition"] == f"label_values({EVERY_LIVE_METRIC}, artifact)"
    assert all(re.fullmatch(r"ray_heliostat_.+", name) for name in LIVE)
    sources = [variables["artifact"]["datasource"], *(panel["datasource"] for panel in drawn(dashboard))]
    sources += [target["datasource"] for panel in drawn(dashboard) for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_prometheus_takes_its_targets_from_the_file_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert discovery["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    assert "static_configs" not in job
