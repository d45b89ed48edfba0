"""Ctrl-C and SIGTERM: at once where nothing is lost, between two steps where something would be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """A signal that is acted on at once. Not KeyboardInterrupt, which the parser of the command line would swallow."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stop_on_signals() -> None:
    """From now on both signals raise Stop, wherever the program is."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stop(number)

    for number in STOPS:
        signal.signal(number, stop)


def ignore_signals() -> None:
    """For the last moments, when leaving is decided."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Whether a signal has asked to stop, and which; `number` is 0 until then."""

    number = 0

    def __bool__(self) -> bool:
        return self.number != 0


@contextmanager
def deferred_stop(asked: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM only sets the StopRequest that is yielded; the second acts at once.

    Args:
        asked: called when the first arrives.

    Outside the main thread signals are left as they are, since Python delivers them there alone.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOPS}

    def note(number: int, frame: FrameType | None) -> None:
        request.number = number
        for each, handler in before.items():
            signal.signal(each, handler)
        asked()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
