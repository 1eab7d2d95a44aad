"""Trying again: full-jitter exponential backoff within a budget of attempts and of seconds.

After the k-th failure the pause is drawn evenly from 0 to min(longest, first * 2^(k-1)) seconds ("full jitter": of thousands of
workers that were refused together, no two come back together). The draws come from the system's own source: they neither use
nor disturb the seeded generators of a run.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from heliostat.errors import HeliostatError

Result = TypeVar("Result")
_generator = random.SystemRandom()


def _draw(low: float, high: float) -> float:
    return _generator.uniform(low, high)


@dataclass(frozen=True)
class Budget:
    """How often and for how long a request is tried. The last attempt may itself take longer, up to its own timeout."""

    attempts: int
    """Requests in all, the first one included; at least 1."""
    seconds: float
    """No attempt begins later than this after the first."""
    first_pause_seconds: float = 0.2
    """Upper end of the first pause; assumption, not studied: about the time in which a store that says SlowDown forgets."""
    longest_pause_seconds: float = 20.0
    """Upper end of any pause."""

    def pause_limit(self, failures: int) -> float:
        """Upper end in seconds of the pause after so many failures, counted from 1."""
        return min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** (failures - 1))


class BudgetSpentError(HeliostatError):
    """Every attempt failed; `__cause__` is the last failure. Callers turn it into a line of their own."""

    def __init__(self, attempts: int, seconds: float) -> None:
        super().__init__(f"tried {attempts} time{'s' if attempts > 1 else ''} in {seconds:.1f} s")


@dataclass(frozen=True)
class Clock:
    """Time and chance, so that tests need neither."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = _draw


REAL_CLOCK = Clock()


def retry(
    call: Callable[[], Result],
    *,
    budget: Callable[[], Budget],
    transient: type[Exception] | tuple[type[Exception], ...],
    before_retry: Callable[[], None] = lambda: None,
    clock: Clock = REAL_CLOCK,
) -> Result:
    """Call until it returns; only `transient` failures are tried again. Raises BudgetSpentError, or what else `call` raises.

    The budget is asked for after every failure: what a failure teaches (somebody is there, but busy) may widen it.
    """
    started = clock.now()
    for attempt in count(1):
        try:
            return call()
        except transient as error:
            limits, elapsed = budget(), clock.now() - started
            pause = clock.uniform(0.0, limits.pause_limit(attempt))
            if attempt >= limits.attempts or elapsed + pause > limits.seconds:
                raise BudgetSpentError(attempt, elapsed) from error
        before_retry()
        clock.sleep(pause)
    raise AssertionError("unreachable: count() does not end")
