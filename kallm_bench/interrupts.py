"""Ctrl-C and SIGTERM in work that may only stop between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a signal has asked to stop, and which; `number` is 0 until then."""

    number = 0

    def __bool__(self) -> bool:
        return self.number != 0


@contextmanager
def deferred_stop() -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM only sets the StopRequest that is yielded; the second acts at once.

    Outside the main thread signals are left as they are, since Python delivers them there alone.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
