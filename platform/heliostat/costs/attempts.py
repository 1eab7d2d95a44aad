"""Time and energy of every attempt at a training run, one small file each in the scratch of the draft.

    _work/costs/<attempt>.json

A process that is killed leaves its file as it was at its newest record; the next attempt writes another one, and together they
are what the run has cost. The commit removes them with the rest of the scratch. A store that cannot be written to costs no run
its training: the count goes on in memory, and the next write brings it all.
"""

import secrets
import time
from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict

from heliostat.errors import StorageError
from heliostat.storage import Store, read_json

FOLDER = "_work/costs/"
_WRITE_SECONDS = 10.0  # a killed process loses the count of this many seconds at most, besides those since its newest record


class Device(BaseModel):
    """What one worker computes on. name is the GPU's, empty for a CPU; cores counts those of a worker without a GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = ""
    uuid: str = ""
    cores: float = 1.0

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return bool(self.name)


class Attempt(BaseModel):
    """One worker group from its start to its newest record. Steps are those done; joules are of one device, None unmeasured."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    device: Device
    num_workers: int
    started: float
    seconds: float = 0.0
    joules: float | None = None
    first_step: int = -1
    """Step at its first record; -1 before it."""
    last_step: int = -1
    first_record_seconds: float = 0.0
    """Seconds from the start to the first record: the start itself, and the steps up to it."""
    record_steps: int = 1
    """Steps between records."""

    @property
    def seconds_per_step(self) -> float:
        """Seconds of one step between the first record and the newest; 0 when there is only one."""
        steps = self.last_step - self.first_step
        return (self.seconds - self.first_record_seconds) / steps if steps > 0 else 0.0


class Meter:
    """Counts one attempt. Only the main rank has one; workers step together, so its time and energy stand for each of them."""

    def __init__(
        self,
        files: Store,
        device: Device,
        *,
        num_workers: int,
        record_steps: int,
        joules: Callable[[], float | None] | None = None,
        notify: Callable[[str], None] = print,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._notify, self._is_failing = notify, False
        self._files, self._clock, self._joules = files, clock, joules
        self._key = f"{FOLDER}{secrets.token_hex(8)}.json"
        self._joules_before = self._measured()
        self._attempt = Attempt(device=device, num_workers=num_workers, started=clock(), record_steps=record_steps)
        self._written = 0.0
        self._write()

    def note(self, step: int) -> None:
        """`step` optimizer steps are done."""
        seconds = self._clock() - self._attempt.started
        update = {"last_step": max(step, self._attempt.last_step)}
        if self._attempt.first_step < 0:
            update |= {"first_step": step}
            self._attempt = self._attempt.model_copy(update={"first_record_seconds": seconds})
        self._attempt = self._attempt.model_copy(update=update)
        if seconds - self._written >= _WRITE_SECONDS or update.get("first_step") is not None:
            self._write()

    def close(self) -> None:
        """Write the last count."""
        self._write()

    def _write(self) -> None:
        seconds = self._clock() - self._attempt.started
        now = self._measured()
        joules = None if now is None or self._joules_before is None else now - self._joules_before
        self._attempt = self._attempt.model_copy(update={"seconds": seconds, "joules": joules})
        self._written = seconds
        try:
            self._files.put(self._key, self._attempt.model_dump_json().encode())
        except StorageError as error:
            if not self._is_failing:
                self._notify(f"costs of this run cannot be kept now: {error}; training goes on")
            self._is_failing = True
        else:
            self._is_failing = False

    def _measured(self) -> float | None:
        """The joules of the device so far; None from the first reading on that it refuses."""
        joules = self._joules() if self._joules else None
        if joules is None:
            self._joules = None
        return joules


def read_attempts(files: Store) -> list[Attempt]:
    """Every attempt so far, in the order they were started. Raises StorageError for a damaged record."""
    fix = "remove it, and the costs of that attempt are not counted"
    found = [read_json(files, entry.key, Attempt.model_validate, fix) for entry in files.list(FOLDER)]
    return sorted(found, key=lambda attempt: attempt.started)


def wasted_seconds(attempts: Iterable[Attempt]) -> list[float]:
    """Seconds of each attempt that went into steps which a later attempt did again, to the resolution of the records."""
    ordered = list(attempts)
    wasted = []
    for position, attempt in enumerate(ordered):
        later = [one.first_step - one.record_steps for one in ordered[position + 1 :] if one.first_step >= 0]
        again = attempt.last_step - max(0, min(later)) if later and attempt.last_step >= 0 else 0
        began = max(0, attempt.first_step - attempt.record_steps)
        again = min(again, attempt.last_step - began) if attempt.last_step >= 0 else 0
        wasted.append(min(attempt.seconds, max(0, again) * attempt.seconds_per_step))
    return wasted
