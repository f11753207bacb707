"""Ctrl-C and SIGTERM: each ends the command once, with one message."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from reftune.errors import ReftuneError

TERMINATED = 143
AGAIN_SECONDS = 1.0
"""A Ctrl-C this soon after another is the same wish, not a second one."""


class Interrupted(ReftuneError):
    """The user pressed Ctrl-C."""

    exit_code, page = 130, "interrupted"


class Terminated(ReftuneError):
    """The system, or somebody, asked the process to end."""

    exit_code, page = TERMINATED, "interrupted"


class _Once:
    """Takes several Ctrl-C in a row for one."""

    def __init__(self) -> None:
        self.last = -AGAIN_SECONDS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        before, self.last = self.last, time.monotonic()
        if self.last - before >= AGAIN_SECONDS:
            raise KeyboardInterrupt


def install() -> None:
    """Let the first Ctrl-C raise KeyboardInterrupt and SIGTERM raise SystemExit.

    Does nothing outside the main thread and where Ctrl-C is ignored already (`nohup`). Processes
    of a distributed run keep the usual SIGTERM: their launcher waits for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
        if os.getpid() != owner:  # a worker that was forked from this process
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise SystemExit(TERMINATED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _Once())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        signal.signal(signal.SIGTERM, terminate)


def settle() -> None:
    """Ignore further Ctrl-C, if `install` was called: the command is ending and says so."""
    if isinstance(signal.getsignal(signal.SIGINT), _Once):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
