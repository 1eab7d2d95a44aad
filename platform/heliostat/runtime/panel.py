"""What a person sees of a training run: a panel of a few lines on a terminal, one plain line now and then elsewhere."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from heliostat.runtime.progress import Progress, Span, bar, duration_text, sparkline

_CURVE_COLUMNS = 24
_LOSSES = ("loss", "dino_global", "dino_local", "ibot", "koleo")
_KNN, _LINEAR, _RANKME = "online/knn_accuracy", "online/linear_accuracy", "online/rankme"
_GIB = 2**30


@dataclass
class _Network:
    """What is known of one network of the run."""

    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluated: dict[int, dict[str, float]] = field(default_factory=dict)
    """What evaluations found, by step."""

    def take(self, metrics: Mapping[str, float], step: int) -> None:
        online = {name: value for name, value in metrics.items() if name.startswith("online/")}
        if _RANKME in online:  # anything else of `online/` is a count of failures
            self.evaluated[step] = online
        if "train/step" in metrics:
            self.metrics, self.step = dict(metrics), step
            self.losses.append(metrics.get("train/loss", float("nan")))

    @property
    def knn_curve(self) -> list[float]:
        """k-NN accuracies by step, or RankMe where there are no labels."""
        return [found.get(_KNN, found[_RANKME]) for _, found in sorted(self.evaluated.items())]


class TrainingPanel:
    """Shows a run of `total` steps that trains `names`; a context manager that leaves the last state at its end."""

    def __init__(self, progress: Progress, total: int, names: Mapping[str, str]) -> None:
        self._progress, self._total, self._names = progress, total, names
        self._networks = {name: _Network() for name in names}
        self._lock = threading.RLock()  # evaluations report from a thread of their own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Leaves the panel as it is at the end, or one line for each network where there is no terminal."""
        if self._progress.is_live:
            if any(network.metrics for network in self._networks.values()):
                self._progress.draw(self.lines())
            self._progress.keep()
            return
        for name, network in self._networks.items():
            if network.metrics:
                self._progress.update(self._plain(name, network), final=True)

    def update(self, name: str, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics of a step, of the training or of an evaluation of earlier weights."""
        with self._lock:
            network = self._networks[name]
            network.take(metrics, step)
            if self._progress.is_live:
                if self._progress.is_due():
                    self._progress.draw(self.lines())
            elif _RANKME in metrics:
                prefix = f"{name}: " if name else ""
                self._progress.say(f"  {prefix}step {step}: teacher {evaluation_text(metrics)}")
            elif "train/step" in metrics:
                self._progress.update(self._plain(name, network))

    def _plain(self, name: str, network: _Network) -> str:
        newest = network.evaluated[max(network.evaluated)] if network.evaluated else {}
        line = training_line({**network.metrics, **newest}, network.step, self._total)
        return f"{name}: {line}" if name else line

    def lines(self) -> list[list[Span]]:
        """The panel: name and bar, speed, and for each network its losses and what its evaluations found."""
        first = max(self._networks.values(), key=lambda network: network.step)
        lines = [
            [Span("  "), Span(", ".join(self._names.values()), "bold"), Span(f"  {bar(first.step, self._total)}")],
            _speed(first.metrics, first.step, self._total),
        ]
        for name, network in self._networks.items():
            prefix = f"  {name}: " if name else "  "
            lines.append([Span(prefix), *self._losses(network)])
            if network.evaluated:
                lines.append([Span(prefix), *self._evaluated(network)])
        return lines

    def _curve(self, values: list[float]) -> Span:
        return Span(sparkline(values, _CURVE_COLUMNS, has_blocks=self._progress.has_blocks), "good")

    def _losses(self, network: _Network) -> list[Span]:
        if not network.losses:
            return [Span("no step is recorded yet", "dim")]
        total, *others = [_with_uniform(name, network.metrics) for name in _LOSSES if f"train/{name}" in network.metrics]
        return [Span(total, "bold"), Span("  "), self._curve(network.losses), Span(f"  {'  '.join(others)}", "dim")]

    def _evaluated(self, network: _Network) -> list[Span]:
        step = max(network.evaluated)
        first, *others = evaluation_text(network.evaluated[step]).split("  ")
        spans = [Span(first, "bold"), Span("  "), self._curve(network.knn_curve)]
        return [*spans, Span(f"  {'  '.join([*others, f'at step {step}'])}", "dim")]


def evaluation_text(metrics: Mapping[str, float]) -> str:
    """What an evaluation found: `k-NN 41.2 %  linear 45.1 %  RankMe 17.3  spread 0.84`; without labels only the last two."""
    names = {_KNN: "k-NN", _LINEAR: "linear"}
    parts = [f"{text} {100 * metrics[name]:.1f} %" for name, text in names.items() if name in metrics]
    return "  ".join([*parts, f"RankMe {metrics[_RANKME]:.1f}", f"spread {metrics['online/feature_std']:.2f}"])


def _speed(metrics: Mapping[str, float], step: int, total: int) -> list[Span]:
    mfu = metrics.get("train/mfu")
    parts = [
        f"step {step}/{total}",
        f"ETA {duration_text(metrics['train/eta_seconds'])}" if "train/eta_seconds" in metrics else "ETA -",
        f"{metrics.get('train/images_per_second', 0.0):.0f} img/s",
        f"MFU {mfu:.0%}" if mfu is not None else "MFU -",
        f"data wait {metrics.get('train/data_wait_ratio', 0.0):.0%}",
    ]
    if "train/memory_bytes" in metrics:
        parts.append(f"memory {metrics['train/memory_bytes'] / _GIB:.1f} GiB")
    return [Span("  " + "  ".join(parts))]


def training_line(metrics: Mapping[str, float], step: int, total: int) -> str:
    """One line about a run: step, time to go, speed, share of time waiting for data, losses / their values at uniform output,
    and what the newest evaluation found."""
    losses = " ".join(_with_uniform(name, metrics) for name in _LOSSES if f"train/{name}" in metrics)
    speed, wait = metrics.get("train/images_per_second", 0.0), metrics.get("train/data_wait_ratio", 0.0)
    parts = [f"{bar(step, total)} step {step}/{total}"]
    if step < total and "train/eta_seconds" in metrics:
        parts.append(f"ETA {duration_text(metrics['train/eta_seconds'])}")
    parts.append(f"{speed:.0f} img/s")
    if "train/mfu" in metrics:
        parts.append(f"MFU {metrics['train/mfu']:.0%}")
    parts += [f"data wait {wait:.0%}", losses]
    if _RANKME in metrics:
        parts.append(f"k-NN {100 * metrics[_KNN]:.1f} %" if _KNN in metrics else f"RankMe {metrics[_RANKME]:.1f}")
    return "  ".join(parts)


def _with_uniform(name: str, metrics: Mapping[str, float]) -> str:
    """A loss, and after a slash what it would be at uniform output."""
    uniform = metrics.get(f"train/{name}_at_uniform")
    return f"{name} {metrics[f'train/{name}']:.3f}" + (f"/{uniform:.2f}" if uniform is not None else "")
