"""Turn SIGINT and SIGTERM into an exception, so that finished work can be kept."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal signals every process, and torchrun then signals its own again. Signals within this
# many seconds count as one request.
SAME_REQUEST = 1.0


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise :class:`Stopped` at the first SIGINT or SIGTERM. A later one ends the process at once.

    A library may turn :class:`Stopped` into another error. This turns it back. Outside the main
    thread nothing changes, because Python handles no signals there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    unraisable = sys.unraisablehook
    received: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append((number, time.monotonic()))
            raise Stopped(number)
        if time.monotonic() - received[0][1] > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def unheard(lost: Any) -> None:
        if isinstance(lost.exc_value, Stopped):
            # It was raised in a finaliser, and Python drops exceptions there. Send the signal again
            # a little later.
            received.clear()
            again = threading.main_thread().ident, lost.exc_value.number
            threading.Timer(0.02, signal.pthread_kill, again).start()
        else:
            unraisable(lost)

    for number in SIGNALS:
        signal.signal(number, stop)
    sys.unraisablehook = unheard
    try:
        yield
    except BaseException as error:
        if received and not isinstance(error, Stopped):
            raise Stopped(received[0][0]) from error
        raise
    finally:
        sys.unraisablehook = unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
