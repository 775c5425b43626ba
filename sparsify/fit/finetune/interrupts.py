"""Ctrl-C and SIGTERM as a request that is honoured between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second SIGINT raises KeyboardInterrupt as usual.

    Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self.former: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
