"""Waiting in tests: for what is to happen, never for a while."""

import faulthandler
import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits for a condition, with a deadline, at which it prints where every thread stands."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            faulthandler.dump_traceback(all_threads=True)
            raise AssertionError(f"the condition did not hold within {seconds:g} s")
        time.sleep(0.005)
