"""The table of metrics is what dashboards and trackers rely on."""

import re

import pytest

from heliostat.metrics import METRICS, Metric, live_metrics


def test_every_name_is_listed_once_and_stays_unique_for_prometheus() -> None:
    from heliostat import metrics

    assert len(metrics._TABLE) == len(METRICS)
    assert len({metric.prometheus_name for metric in METRICS.values()}) == len(METRICS)
    assert [name for name, metric in METRICS.items() if name != metric.name] == []


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_a_metric_has_a_stage_a_safe_name_a_unit_and_a_meaning(metric: Metric) -> None:
    assert re.fullmatch(r"(cost|crawl|dedup|curate|train|online|evaluate|publish)/[a-z][a-z0-9_]*", metric.name)
    assert re.fullmatch(r"ray_heliostat_[a-z0-9_]+", metric.prometheus_name)
    assert metric.prometheus_name == f"ray_{metric.short_name}"
    assert metric.unit
    assert len(metric.meaning.split()) >= 3
    assert not metric.meaning.endswith(".")


def test_a_ratio_says_so_and_has_no_unit() -> None:
    for metric in METRICS.values():
        if metric.name.endswith("_ratio") or metric.name.endswith("_accuracy"):
            assert metric.unit == "1", metric.name


def test_prometheus_sees_the_live_metrics_only() -> None:
    live = live_metrics()
    assert [metric for metric in METRICS.values() if metric.live] == live
    assert {"train/loss", "train/step", "curate/rows_in", "curate/rows_kept"} <= {metric.name for metric in live}
    assert not [metric for metric in live if metric.name.startswith("evaluate/")]


def test_the_prometheus_name_replaces_the_slash() -> None:
    assert METRICS["train/dino_global"].prometheus_name == "ray_heliostat_train_dino_global"
