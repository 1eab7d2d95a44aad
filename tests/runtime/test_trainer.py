"""What a person reads when a worker fails: the last telling line of what Ray wrapped around the cause."""

from heliostat.runtime.trainer import _readable


class FailedError(Exception):
    """As Ray Train's error: causes by rank."""

    def __init__(self, text: str, causes: dict[int, BaseException]) -> None:
        super().__init__(text)
        self.worker_failures = causes


def test_colours_and_markers_are_left_out() -> None:
    text = "Training failed due to \x1b[36mray::Worker\x1b[39m\n    run(job)\n    ^^^^^^^^\nKeyError: 'center'\n    ^^^\n"
    assert str(_readable(FailedError(text, {}))) == "the worker group failed: KeyError: 'center'; see --debug"


def test_the_cause_of_the_first_worker_counts() -> None:
    error = FailedError("2 workers failed", {1: ValueError("Traceback\n  line\nno space left\n")})
    assert str(_readable(error)) == "worker 1 failed: no space left; see --debug"


def test_an_error_without_words_is_named_by_its_kind() -> None:
    assert str(_readable(FailedError("", {}))) == "the worker group failed: FailedError; see --debug"
