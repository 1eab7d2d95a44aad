"""What a tracker and its runs promise, and the ones that keep nothing."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Notify = Callable[[str], None]
Sample = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Link:
    """An artifact as a tracker names it: `kind/name@version`, its fingerprint and where its files lie."""

    ref: str
    fingerprint: str
    uri: str

    @property
    def is_model(self) -> bool:
        """Whether it holds weights, and is therefore linked as a model and not as a dataset."""
        return self.ref.startswith("model/")


class Run(Protocol):
    """One open run. When the server is lost while it goes on, what it receives waits and is sent later."""

    @property
    def id(self) -> str:
        """Identity to `attach` to; empty when nothing is recorded."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step, in one request. A (metric, step) that the run has already keeps its first value."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Keep one local file with the run."""

    def log_bytes(self, name: str, data: bytes) -> None:
        """Keep a file of this content with the run; `name` may have folders."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""

    def log_inputs(self, inputs: Mapping[str, Link]) -> None:
        """What the run works from, by role: models as models, all else as datasets."""

    def log_model(self, model: Link, *, step: int, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """A model that the run made, by reference to the store; made once, however often it is called."""

    def register_model(
        self, model: Link, name: str, *, aliases: Iterable[str], tags: Mapping[str, str], description: str
    ) -> None:
        """A version of the registered model `name` that points at a logged model; made once; aliases move to it."""

    def watch_system(self, also: Sample = dict) -> AbstractContextManager[None]:
        """Record what this machine does (CPUs, memory, disk, network, and what `also` says) until the context ends."""

    def finish(self, status: str) -> None:
        """Close with FINISHED, FAILED or KILLED."""


class Tracker(Protocol):
    """Opens runs. Instances can be pickled and used in workers."""

    @property
    def uri(self) -> str:
        """The tracking URI, empty when nothing is recorded."""

    def start(
        self,
        name: str,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        resume_id: str = "",
        notify: Notify = ...,
    ) -> Run:
        """Open a run, or reopen `resume_id` when it exists. `notify` is told when the server is lost and when it is back."""

    def attach(self, run_id: str, notify: Notify = ...) -> Run:
        """The open run with this id."""


class NullRun:
    """Keeps nothing."""

    id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing is kept."""

    def log_file(self, path: Path, folder: str = "") -> None:
        """Nothing is kept."""

    def log_bytes(self, name: str, data: bytes) -> None:
        """Nothing is kept."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Nothing is kept."""

    def log_inputs(self, inputs: Mapping[str, Link]) -> None:
        """Nothing is kept."""

    def log_model(self, model: Link, *, step: int, tags: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def register_model(
        self, model: Link, name: str, *, aliases: Iterable[str], tags: Mapping[str, str], description: str
    ) -> None:
        """Nothing is kept."""

    def watch_system(self, also: Sample = dict) -> AbstractContextManager[None]:
        """Nothing is watched."""
        return nullcontext()

    def finish(self, status: str) -> None:
        """Nothing is kept."""


class NullTracker:
    """Keeps nothing: `tracking.uri=none`."""

    uri = ""

    def start(
        self,
        name: str,
        *,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        resume_id: str = "",
        notify: Notify = print,
    ) -> Run:
        return NullRun()

    def attach(self, run_id: str, notify: Notify = print) -> Run:
        return NullRun()
