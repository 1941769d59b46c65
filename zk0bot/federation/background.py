"""Work beside the round loop, on threads that never hold up the end of the process."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future


def start_thread[T](work: Callable[[], T]) -> Future[T]:
    """Do ``work`` on a daemon thread of its own."""
    future: Future[T] = Future()
    threading.Thread(target=_carry_out, args=(future, work), daemon=True).start()
    return future


class Worker:
    """Does what it is given, one thing after the other, on one daemon thread."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[object], Callable[[], object]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, daemon=True).start()

    def submit[T](self, work: Callable[[], T]) -> Future[T]:
        """Do ``work`` when all that was submitted before is done or cancelled."""
        future: Future[T] = Future()
        self._jobs.put((future, work))  # type: ignore[arg-type]  # one queue for all kinds of result
        return future

    def _work(self) -> None:
        while True:
            _carry_out(*self._jobs.get())


def _carry_out[T](future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001  whoever asks for the result gets it
        future.set_exception(error)
    else:
        future.set_result(result)
