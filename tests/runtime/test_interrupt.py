"""Ctrl-C reaches the caller while work runs in a thread."""

import os
import signal
import threading
import time

import pytest

from heliostat.runtime.interrupt import run_interruptible


def test_the_result_and_the_error_of_the_work_come_back() -> None:
    assert run_interruptible(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        run_interruptible(lambda: 1 // 0)


def test_a_signal_interrupts_the_wait_at_once() -> None:
    done = threading.Event()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_interruptible(lambda: done.wait(20))
    finally:
        done.set()
        timer.join()
    assert time.monotonic() - started < 5


def test_the_work_is_not_in_the_main_thread_where_ray_would_take_the_signal() -> None:
    assert run_interruptible(threading.current_thread) is not threading.main_thread()
