"""Short memory on the device: work in smaller parts, and remember what fits."""

import logging
from collections.abc import Callable

import torch

from zk0bot.errors import MemoryShortError

logger = logging.getLogger(__name__)


class MicroBatch:
    """How many samples of one kind of work fit on the device at a time; only ever shrinks.

    Kept with the policy, so that memory runs out once and not in each round anew.
    """

    def __init__(self) -> None:
        self._limit: int | None = None

    def size(self, batch_size: int) -> int:
        """Samples at a time for a batch of ``batch_size``."""
        return batch_size if self._limit is None else min(batch_size, self._limit)

    def run[T](self, batch_size: int, work: Callable[[int], T]) -> T:
        """``work(samples at a time)``; begun again with half as many where memory is short.

        Raises MemoryShortError when one sample at a time is too much.
        """
        while True:
            size = self.size(batch_size)
            try:
                return work(size)
            except torch.cuda.OutOfMemoryError as error:
                self._halve(size, error)
            torch.cuda.empty_cache()  # here, where the error no longer keeps tensors alive

    def _halve(self, size: int, error: torch.cuda.OutOfMemoryError) -> None:
        if size == 1:
            raise MemoryShortError(
                "out of memory even with one sample at a time",
                hint="use a machine with more memory, or a smaller model or picture size",
            ) from error
        self._limit = (size + 1) // 2
        logger.warning("out of memory: going on with %d samples at a time", self._limit)
