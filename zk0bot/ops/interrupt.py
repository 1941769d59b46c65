"""SIGTERM and SIGHUP as Ctrl-C, and work that none of them disturbs. Standard library only."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does; only the first of them counts.

    What the first one unwinds is not disturbed by a second, to the end of the process. A SIGHUP
    that nohup switched off stays so. For the main thread.
    """
    is_hangup_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = SIGNALS[:2] if is_hangup_ignored else SIGNALS
    with _handling(dict.fromkeys(numbers, _interrupt)):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No signal interrupts the body. Outside the main thread, where none arrives, it does nothing.

    A program that is started in the body inherits this: start none that lasts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handling(dict.fromkeys(SIGNALS, signal.SIG_IGN)):
        yield


def _interrupt(number: int, frame: object) -> None:
    for later in SIGNALS:
        signal.signal(later, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == handlers[number]:  # else an interruption is under way
                signal.signal(number, handler)
