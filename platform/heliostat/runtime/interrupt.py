"""Ctrl-C stays ours while Ray Train and Ray Tune run.

Called in the main thread, both install handlers for SIGINT of their own: Train's swallows the signal or ends the process with
status 0, and stays installed after the run. In another thread they install none.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_interruptible(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread; a signal's KeyboardInterrupt is raised here at once.

    The thread is a daemon: what it waits for ends with the Ray session.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  (raised in the caller's thread)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="heliostat-run").start()
    return future.result()
