"""A signal that ends nothing and interrupts nothing: it waits until somebody looks whether it came."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

POLL_SECONDS = 0.2


class HeldSignal:
    """From now on `number` is held back from this process, and from those that it starts, which inherit the mask.

    So a batch system may send it to every process of a job, the helpers of the ranks among them, and it kills none. To be made in
    the main thread, early: threads that run already have a mask of their own. Where one lets it through, a handler notes it.

    Example:
        >>> held = HeldSignal(signal.SIGUSR1)
        >>> held.came()  # True once somebody has sent it, and ever after
        False
    """

    def __init__(self, number: signal.Signals):
        self._number, self._caught = number, False
        signal.signal(number, self._catch)
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def came(self) -> bool:
        """Whether it was sent to this process."""
        return self._caught or self._number in signal.sigpending()

    @contextlib.contextmanager
    def passed_on(self, act: Callable[[], None]) -> Iterator[None]:
        """For a process that is busy waiting for others: when the signal comes `act` is called, once, in another thread."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(POLL_SECONDS):
                if self.came():
                    act()
                    return

        thread = threading.Thread(target=look, name="held-signal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _catch(self, number: int, frame: object) -> None:
        self._caught = True
