"""Ctrl-C stays ours while Ray Train and Ray Tune run.

Called in the main thread, both install handlers for SIGINT of their own: Train's swallows the signal or ends the process with
status 0, and stays installed after the run. In another thread they install none.
"""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> "Future[T]":
    """Start `work` in a thread. The thread is a daemon: what it waits for ends with the Ray session, or with the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  (raised in the caller's thread)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="heliostat-run").start()
    return future


def run_interruptible(work: Callable[[], T], ask_to_stop: Callable[[], None] | None = None, grace_seconds: float = 0.0) -> T:
    """The result of `work`, done in a thread; a signal's KeyboardInterrupt is raised here at once.

    With ask_to_stop the first signal only asks, and the work may take grace_seconds to end by itself; a second one, or the end
    of that time, raises.
    """
    future = in_thread(work)
    try:
        return future.result()
    except KeyboardInterrupt:
        if ask_to_stop is None or future.done():
            raise
    ask_to_stop()
    try:
        return future.result(grace_seconds)
    except TimeoutError as error:
        if future.done():
            raise
        raise KeyboardInterrupt from error


class StopFlag:
    """Set by the first SIGINT or SIGTERM while the `with` block lasts; a second one interrupts as always.

    Outside of the main thread, where no handler can be installed, it is never set.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._is_set = False
        self._handlers: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether somebody asked to stop."""
        return self._is_set

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self._is_set:
            raise KeyboardInterrupt
        self._is_set = True
        self._notify()

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
