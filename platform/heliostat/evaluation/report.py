"""One self-contained HTML page about a model: data, training, accuracy, pictures, lineage."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliostat.artifacts import ArtifactRecord

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_LOSSES = ("train/loss", "train/dino_global", "train/dino_local", "train/ibot", "train/koleo")


@dataclass(frozen=True)
class ReportInputs:
    """What the page shows. `pictures` are PNG bytes by name; `histories` are metric records by role."""

    title: str
    results: Mapping[str, Any]
    pictures: Mapping[str, bytes]
    histories: Mapping[str, Sequence[Mapping[str, float]]]
    funnel: Sequence[Mapping[str, Any]] = ()
    copies: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[str, ArtifactRecord] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ()


def _svg(figure: Any) -> str:
    """A matplotlib figure as inline SVG without its XML head."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Losses over steps, one panel per run, as SVG; dashed: the same loss at uniform output."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, len(histories))
    lines = -(-len(histories) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "heliostat", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.6 * columns, 2.8 * lines))
        for position, (role, rows) in enumerate(histories.items()):
            axes = figure.add_subplot(lines, columns, position + 1)
            for name in _LOSSES:
                values = [(row["step"], row[name]) for row in rows if name in row]
                if not values:
                    continue
                marker = "o" if len(values) == 1 else ""  # a run with a single record has no line
                (line,) = axes.plot(*zip(*values, strict=True), marker=marker, label=name.removeprefix("train/"), linewidth=1.4)
                bound = [(row["step"], row[f"{name}_at_uniform"]) for row in rows if f"{name}_at_uniform" in row]
                if bound:
                    axes.plot(*zip(*bound, strict=True), "--", color=line.get_color(), linewidth=0.9, alpha=0.7)
            axes.set_title(role)
            axes.set_xlabel("step")
            axes.set_ylabel("nats")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=7)
        figure.tight_layout()
        return _svg(figure)


# Columns of the table "is this normal?": the number, what stands beside it, how both are shown.
_HEALTH = (
    ("dino_global", "train/dino_global", "train/dino_global_at_uniform", "{:.3f} of {:.3f}"),
    ("dino_local", "train/dino_local", "train/dino_local_at_uniform", "{:.3f} of {:.3f}"),
    ("ibot", "train/ibot", "train/ibot_at_uniform", "{:.3f} of {:.3f}"),
    ("teacher entropy", "train/teacher_entropy", "train/teacher_entropy_at_uniform", "{:.2f} of {:.2f}"),
    ("KL to teacher", "train/kl_to_teacher", "", "{:.3f}"),
    ("feature_std", "train/feature_std", "", "{:.2f}"),
    ("RankMe", "train/rankme", "", "{:.1f}"),
    ("prototypes used", "train/prototype_usage", "", "{:.2f}"),
    ("gradient norm", "train/grad_norm", "", "{:.2f}"),
    ("signs of collapse", "train/collapse_signs", "", "{:.0f}"),
)


def health_table(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    """The last record of every run as text: a head of columns, then a row per run; "" where a run lacks a number."""
    table = [["run", *(title for title, *_ in _HEALTH)]]
    for role, rows in histories.items():
        last = rows[-1] if rows else {}
        cells = [form.format(last[name], last.get(beside, 0.0)) if name in last else "" for _, name, beside, form in _HEALTH]
        table.append([role, *cells])
    return table


def accuracy_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """k-NN accuracy of every row with its spread, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "heliostat", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 0.3 * len(rows) + 0.8))
        axes = figure.add_subplot()
        names = [f"{row['name']} ({row['version']})" for row in rows]
        plain = ("raw pixels", "colour histogram", "luminance histogram", "random weights")
        colors = ["#9aa4b2" if row["name"] in plain else "#d9730d" for row in rows]
        values = [100 * row["knn"] for row in rows]
        axes.barh(range(len(rows)), values, xerr=[100 * row["knn_std"] for row in rows], color=colors, height=0.65)
        axes.set_yticks(range(len(rows)), labels=names, parse_math=False)  # a name may hold a dollar sign
        for index, value in enumerate(values):
            axes.text(1, index, f"{value:.1f}", va="center", color="white", fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("k-NN accuracy on held-out images, %")
        axes.set_xlim(0, 100)
        return _svg(figure)


def render_report(inputs: ReportInputs) -> str:
    """The page as HTML. Text from recipes and file names is escaped; nothing is loaded from elsewhere."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["thousands"] = lambda value: f"{value:,}"
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=inputs,
        curves=Markup(loss_curves(inputs.histories)),  # noqa: S704  (our own SVG)
        health=health_table(inputs.histories),
        bars=Markup(accuracy_bars(inputs.results["rows"])),  # noqa: S704
        pictures={name: base64.b64encode(data).decode() for name, data in inputs.pictures.items()},
    )
