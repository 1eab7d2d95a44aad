"""The panel of a training run, on a screen and in a log."""

import errno
import fcntl
import io
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from screen import Screen

from heliostat.runtime import progress
from heliostat.runtime.panel import TrainingPanel, evaluation_text, training_line
from heliostat.runtime.progress import Progress

METRICS = {
    "train/step": 4.0,
    "train/loss": 8.18,
    "train/ibot": 1.5,
    "train/ibot_at_uniform": 1.56,
    "train/images_per_second": 61.7,
    "train/data_wait_ratio": 0.031,
    "train/eta_seconds": 200.0,
    "train/memory_bytes": 2.5 * 2**30,
}
FOUND = {"online/knn_accuracy": 0.412, "online/linear_accuracy": 0.451, "online/rankme": 17.3, "online/feature_std": 0.84}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")


def seen(stream: io.StringIO, columns: int = 120) -> list[str]:
    shown = Screen(columns)
    shown.feed(stream.getvalue())
    assert shown.num_wraps == 0
    return shown.lines()


def test_a_panel_shows_speed_losses_and_what_the_newest_evaluation_found() -> None:
    stream = Terminal()
    with TrainingPanel(Progress(stream), 8, {"": "model/tiny@1"}) as panel:
        panel.update("", METRICS | {"train/loss": 9.0}, 2)
        panel.update("", METRICS, 4)
        panel.update("", FOUND | {"online/knn_accuracy": 0.3}, 2)
        panel.update("", FOUND, 4)
        assert seen(stream) == [
            "  model/tiny@1  [##########..........]  50 %",
            "  step 4/8  ETA 3 min 20 s  62 img/s  MFU -  data wait 3%  memory 2.5 GiB",
            "  loss 8.180  █▁  ibot 1.500/1.56",
            "  k-NN 41.2 %  ▁█  linear 45.1 %  RankMe 17.3  spread 0.84  at step 4",
        ]
    Progress(stream).say("the next line")
    assert seen(stream)[-2:] == ["the next line", ""]


def test_an_evaluation_that_comes_late_keeps_its_place_in_the_curve() -> None:
    stream = Terminal()
    panel = TrainingPanel(Progress(stream), 8, {"": "model/tiny@1"})
    panel.update("", METRICS, 8)
    panel.update("", FOUND | {"online/knn_accuracy": 0.9}, 8)
    panel.update("", FOUND | {"online/knn_accuracy": 0.1}, 2)
    assert "k-NN 90.0 %  ▁█" in seen(stream)[-1]


def test_failures_alone_are_no_evaluation() -> None:
    panel = TrainingPanel(Progress(Terminal()), 8, {"": "model/tiny@1"})
    panel.update("", METRICS, 4)
    panel.update("", {"online/failures": 1.0}, 4)
    assert len(panel.lines()) == 3


def test_every_student_has_its_lines() -> None:
    stream = Terminal()
    panel = TrainingPanel(Progress(stream), 8, {"small": "model/tiny-small@1", "other": "model/tiny-other@1"})
    panel.update("small", METRICS, 4)
    assert [line[:30].rstrip() for line in seen(stream)] == [
        "  model/tiny-small@1, model/ti",
        "  step 4/8  ETA 3 min 20 s  62",
        "  small: loss 8.180  ▁  ibot 1",
        "  other: no step is recorded y",
    ]


def test_mfu_is_shown_where_a_peak_is_known() -> None:
    stream = Terminal()
    TrainingPanel(Progress(stream), 8, {"": "model/tiny@1"}).update("", METRICS | {"train/mfu": 0.413}, 4)
    assert "MFU 41%" in seen(stream)[1]
    assert "MFU 41%" in training_line(METRICS | {"train/mfu": 0.413}, 4, 8)


@pytest.mark.parametrize("columns", [10, 25, 60, 100])
def test_a_narrow_terminal_loses_the_right_end_of_lines(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    panel = TrainingPanel(Progress(stream), 8, {"": "model/tiny@1"})
    for step in (2, 4, 6):
        panel.update("", METRICS, step)
        panel.update("", FOUND, step)
    lines = seen(stream, columns)
    assert len(lines) == 4
    assert lines[0].startswith("  model/")


def test_a_log_has_a_line_for_an_evaluation_and_one_for_the_end() -> None:
    stream = io.StringIO()
    with TrainingPanel(Progress(stream), 8, {"": "model/tiny@1"}) as panel:
        panel.update("", METRICS, 4)
        panel.update("", FOUND, 4)
    assert stream.getvalue().splitlines() == [
        "  [##########..........]  50 % step 4/8  ETA 3 min 20 s  62 img/s  data wait 3%  loss 8.180 ibot 1.500/1.56",
        "  step 4: teacher k-NN 41.2 %  linear 45.1 %  RankMe 17.3  spread 0.84",
        "  [##########..........]  50 % step 4/8  ETA 3 min 20 s  62 img/s  data wait 3%  loss 8.180 ibot 1.500/1.56"
        "  k-NN 41.2 %",
    ]


def test_a_training_line_holds_what_is_known() -> None:
    metrics = {"train/loss": 8.18, "train/ibot": 1.5, "train/images_per_second": 61.7, "train/data_wait_ratio": 0.031}
    assert training_line(metrics, 4, 8) == (
        "[##########..........]  50 % step 4/8  62 img/s  data wait 3%  loss 8.180 ibot 1.500"
    )


def test_without_labels_rankme_takes_the_place_of_k_nn() -> None:
    bare = {"online/rankme": 17.3, "online/feature_std": 0.84}
    assert evaluation_text(bare) == "RankMe 17.3  spread 0.84"
    assert training_line(METRICS | bare, 4, 8).endswith("RankMe 17.3")
    stream = Terminal()
    panel = TrainingPanel(Progress(stream), 8, {"": "model/tiny@1"})
    panel.update("", bare, 2)
    panel.update("", bare | {"online/rankme": 20.0}, 4)
    assert seen(stream)[-1] == "  RankMe 20.0  ▁█  spread 0.84  at step 4"


_IN_A_TERMINAL = """
import sys
from heliostat.runtime.panel import TrainingPanel
from heliostat.runtime import progress
progress._REFRESH_SECONDS = 0.0
shown = progress.Progress()
with TrainingPanel(shown, 40, {"": "model/tiny@1"}) as panel:
    for step in range(1, 41):
        panel.update("", {"train/step": step, "train/loss": 9 - step / 10, "train/images_per_second": 50.0}, step)
        if step % 10 == 0:
            panel.update("", {"online/rankme": step, "online/feature_std": 0.8, "online/knn_accuracy": step / 50}, step)
            shown.say(f"event of step {step}")
print("the end")
"""


def output_in_a_terminal(columns: int, height: int, **environment: str) -> str:
    """What a process of its own writes to a pseudo-terminal of that size."""
    root = Path(progress.__file__).parents[2]
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))
    arguments = [sys.executable, "-c", _IN_A_TERMINAL]
    child = os.posix_spawn(
        sys.executable,
        arguments,
        plain | {"PYTHONPATH": str(root), "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
        file_actions=[(os.POSIX_SPAWN_DUP2, other, stream) for stream in (0, 1, 2)],
    )
    os.close(other)
    data = b""
    try:
        while piece := os.read(main, 65_536):
            data += piece
    except OSError as error:  # how Linux says that the other side is closed
        if error.errno != errno.EIO:
            raise
    os.close(main)
    assert os.waitpid(child, 0)[1] == 0, data.decode()
    return data.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [50, 110])
def test_a_real_terminal_shows_events_above_one_panel(columns: int) -> None:
    text = output_in_a_terminal(columns, 12)
    shown = Screen(columns, 12)
    shown.feed(text)
    assert shown.num_wraps == 0
    lines = shown.lines()
    assert lines[:4] == [f"event of step {step}" for step in (10, 20, 30, 40)]
    assert lines[4] == "  model/tiny@1  [####################] 100 %"
    assert lines[5].startswith("  step 40/40  ")
    assert lines[6].startswith("  loss 5.000  ██▇▇▇▆")
    assert lines[7].startswith("  k-NN 80.0 %  ▁▃▆█")
    assert lines[8:] == ["the end", ""]
    assert "\x1b[36m" in text


def test_a_real_terminal_without_colours_or_blocks_gets_none() -> None:
    text = output_in_a_terminal(110, 12, NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert not [character for character in text if ord(character) > 126]
    assert "m" not in {piece[:4].lstrip("0123456789;")[:1] for piece in text.split("\x1b[")[1:]}
    shown = Screen(110, 12)
    shown.feed(text)
    assert shown.lines()[6].startswith("  loss 5.000  @@")


def test_a_dumb_terminal_gets_plain_lines() -> None:
    text = output_in_a_terminal(110, 12, TERM="dumb")
    assert "\x1b" not in text
    assert "  step 10: teacher k-NN 20.0 %  RankMe 10.0  spread 0.80\n" in text
