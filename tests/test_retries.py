"""Budgets, pauses and what is passed on; time and chance are given."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from heliostat.retries import Budget, BudgetSpentError, Clock, retry


class FaultError(Exception):
    """What is tried again."""


@dataclass
class Simulation:
    """A clock whose time passes only in pauses and in calls."""

    call_seconds: float = 0.0
    seed: int = 0
    time: float = 0.0
    pauses: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    calls: int = 0

    @property
    def clock(self) -> Clock:
        generator = random.Random(self.seed)

        def sleep(seconds: float) -> None:
            self.pauses.append(seconds)
            self.time += seconds

        def uniform(low: float, high: float) -> float:
            assert low == 0.0
            self.limits.append(high)
            return generator.uniform(low, high)

        return Clock(now=lambda: self.time, sleep=sleep, uniform=uniform)

    def failing(self, times: float) -> Callable[[], str]:
        def call() -> str:
            self.calls += 1
            self.time += self.call_seconds
            if self.calls <= times:
                raise FaultError(f"fault {self.calls}")
            return "done"

        return call


def run(simulation: Simulation, times: float, budget: Budget) -> str:
    return retry(simulation.failing(times), budget=lambda: budget, transient=FaultError, clock=simulation.clock)


def test_a_call_that_works_is_made_once_without_a_pause() -> None:
    simulation = Simulation()
    assert run(simulation, 0, Budget(5, 10)) == "done"
    assert (simulation.calls, simulation.pauses) == (1, [])


def test_pauses_are_drawn_from_zero_to_a_limit_that_doubles_up_to_the_longest() -> None:
    simulation = Simulation()
    assert run(simulation, 8, Budget(20, 1000, first_pause_seconds=0.5, longest_pause_seconds=10)) == "done"
    assert simulation.limits == [0.5, 1, 2, 4, 8, 10, 10, 10]
    assert all(0 <= pause <= limit for pause, limit in zip(simulation.pauses, simulation.limits, strict=True))


def test_two_clients_that_failed_together_do_not_come_back_together() -> None:
    pauses = []
    for _ in range(50):
        found: list[float] = []
        budget = Budget(2, 10, first_pause_seconds=1.0)
        retry(Simulation().failing(1), budget=lambda b=budget: b, transient=FaultError, clock=Clock(sleep=found.append))
        pauses += found
    assert len(set(pauses)) == 50
    assert min(pauses) < 0.25
    assert max(pauses) > 0.75


def test_the_seeded_generator_of_a_run_is_neither_used_nor_disturbed() -> None:
    random.seed(7)
    before = random.getstate()
    retry(Simulation().failing(3), budget=lambda: Budget(9, 9), transient=FaultError, clock=Clock(sleep=lambda _: None))
    assert random.getstate() == before


def test_attempts_are_bounded_and_the_last_failure_is_kept() -> None:
    simulation = Simulation()
    with pytest.raises(BudgetSpentError, match=r"^tried 4 times in \d+\.\d s$") as caught:
        run(simulation, float("inf"), Budget(4, 1000))
    assert simulation.calls == 4
    assert str(caught.value.__cause__) == "fault 4"


@pytest.mark.parametrize("call_seconds", [0.0, 0.7, 60.0])
@pytest.mark.parametrize("seed", range(10))
def test_no_attempt_begins_after_the_seconds_are_over(call_seconds: float, seed: int) -> None:
    simulation = Simulation(call_seconds, seed)
    with pytest.raises(BudgetSpentError):
        run(simulation, float("inf"), Budget(10_000, 180))
    assert simulation.time - call_seconds <= 180
    assert simulation.time > min(150, call_seconds) - 1e-9


def test_what_is_not_transient_is_passed_on_at_once() -> None:
    simulation = Simulation()
    with pytest.raises(FaultError):
        retry(simulation.failing(1), budget=lambda: Budget(9, 9), transient=KeyError, clock=simulation.clock)
    assert simulation.calls == 1


def test_a_budget_may_grow_when_a_failure_shows_that_somebody_is_there() -> None:
    simulation, seen = Simulation(), []

    def budget() -> Budget:
        seen.append(1)
        return Budget(2, 10) if len(seen) < 2 else Budget(6, 100)

    assert retry(simulation.failing(5), budget=budget, transient=FaultError, clock=simulation.clock) == "done"


def test_every_repetition_is_announced() -> None:
    simulation, announced = Simulation(), []
    retry(
        simulation.failing(3),
        budget=lambda: Budget(9, 100),
        transient=FaultError,
        before_retry=lambda: announced.append(1),
        clock=simulation.clock,
    )
    assert len(announced) == 3


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_towards_a_known_store_outlives_a_minute_and_the_other_ends_within_seconds(seed: int) -> None:
    from heliostat.storage import S3Limits

    limits, simulation = S3Limits(), Simulation(seed=seed)
    clock, calls = simulation.clock, []

    def during_an_outage() -> str:
        calls.append(simulation.time)
        if simulation.time < 60:
            raise FaultError
        return "done"

    assert retry(during_an_outage, budget=lambda: limits.patient, transient=FaultError, clock=clock) == "done"
    wrong = Simulation(5.0, seed)  # 5 s: the timeout of a connection
    with pytest.raises(BudgetSpentError):
        run(wrong, float("inf"), limits.hasty)
    assert wrong.time <= 15
