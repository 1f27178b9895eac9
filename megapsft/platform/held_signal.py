"""A signal that ends nothing and interrupts nothing: it waits until somebody looks whether it came."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 0.2


class HeldSignal:
    """From now on `number` is held back from this process and from those that it starts: they inherit the mask.

    So a batch system may send it to every process of a job, the helpers of the ranks among them, and it kills none. Of the main
    thread; the threads that libraries have started before keep their own mask, and for them there is a handler.

    Example:
        >>> held = HeldSignal(signal.SIGUSR1)
        >>> held.came()  # True once somebody has sent it
        False
    """

    def __init__(self, number: signal.Signals):
        self._number, self._caught = number, False
        signal.signal(number, self._catch)
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    def came(self) -> bool:
        """Whether it was sent to this process; it stays so."""
        return self._caught or self._number in signal.sigpending()

    def when_it_comes(self, act: Callable[[], None]) -> None:
        """Call `act` once, in a thread of its own: for a process that is busy waiting for others."""

        def look() -> None:
            while not self.came():
                time.sleep(POLL_SECONDS)
            act()

        threading.Thread(target=look, name="held-signal", daemon=True).start()

    def _catch(self, number: int, frame: object) -> None:
        self._caught = True
