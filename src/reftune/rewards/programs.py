"""Running programs that a model wrote: one number or text comes back, or nothing.

A program defines `solution()`. It runs in pydantic-monty, an interpreter of its own with limits of
time and memory in processes of its own, where that is installed (extra `reinforced`). What monty
cannot run, and everything without it, goes to workers of our own: `program_worker` says what is
taken away from a program there. Results come back as plain numbers and texts in JSON; nothing is
ever unpickled. A program that breaks its worker breaks nothing else: another worker is started.

What this does not protect against:

- flaws of the kernel or of monty, and side channels;
- on systems other than Linux on x86-64 and ARM64: a program that gets around Python itself, for
  there is no seccomp filter, only limits and an audit hook; macOS does not limit memory either;
- inside a container that forbids seccomp: the same;
- programs that use up their time: each may take `seconds`, with `workers` at once;
- a program that says a right number for wrong reasons.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reftune.errors import RecipeError

WORKER = Path(__file__).with_name("program_worker.py")
GRACE = 2.0
"""Seconds a worker may be late, before it is killed too."""
START = 60.0
"""Seconds a worker may take to start, and to load sympy when it is first asked for."""
PRINTED = 1 << 16
"""Bytes a program may print in monty; elsewhere nothing is kept."""
CANNOT = (AttributeError, ImportError, NameError, NotImplementedError, SyntaxError, TypeError)
"""What monty raises where it lacks something, and where the program is wrong: only running the
program elsewhere tells which."""

_CALL = """
__value = solution()
try:
    __number = repr(float(__value))
except Exception:
    __number = None
(__number, str(__value)[:1000])
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Wall time.
        memory: Bytes, beside what the interpreter itself takes.

    Raises:
        RecipeError: If they let no program run.
    """

    seconds: float = 10.0
    memory: int = 512 * 2**20

    def __post_init__(self) -> None:
        if not (0 < self.seconds < math.inf and self.memory > 0):
            raise RecipeError(
                f"{self.seconds:g} seconds and {self.memory / 2**20:g} MiB let no program run.",
                "Use more than 0, and an end.",
            )


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        number: The value of `solution()` as `float` takes it, NaN and infinity included; or None.
        text: The value as text, at most 1,000 characters; or None if there is no value.
        error: Why there is no value; empty if there is one.
    """

    number: float | None = None
    text: str | None = None
    error: str = ""


class Programs:
    """Workers that run programs; they start when they are needed and stay.

    Args:
        limits: What a program may use.
        workers: Programs that run at once.
        monty: Whether to use pydantic-monty; default is whether it is installed.

    >>> with Programs() as programs:
    ...     programs.run("def solution():\\n    return 3 * 4").number
    12.0
    """

    def __init__(
        self, limits: Limits | None = None, workers: int = 2, monty: bool | None = None
    ) -> None:
        self.limits = limits or Limits()
        if workers < 1:
            raise RecipeError(f"{workers} workers let no program run.", "Use at least 1.")
        self.workers = workers
        self._wants_monty = has_monty() if monty is None else monty
        self._monty: Any = None
        self._lock = threading.Lock()
        self._idle: queue.Queue[_Worker] = queue.Queue()
        for _ in range(workers):
            self._idle.put(_Worker())

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for _ in range(self.workers):
            worker = self._idle.get()
            worker.kill()
            self._idle.put(worker)
        with self._lock:
            pool, self._monty = self._monty, None
        if pool is not None:
            pool.__exit__(None, None, None)

    def run(self, source: str, compat: bool = False) -> Outcome:
        """Run one program; nothing that it does raises.

        Args:
            source: Text that defines `solution()`. `math` is there, and `sympy` where it is named.
            compat: Run it in two namespaces, as the published code of reinforced fine-tuning does:
                what stands beside `solution` is not seen in it. Never in monty.
        """
        if not compat and self._wants_monty:
            found = self._in_monty(source)
            if found is not None:
                return found
        worker = self._idle.get()
        try:
            return worker.run(source, compat, self.limits)
        finally:
            self._idle.put(worker)

    def run_all(self, sources: Sequence[str], compat: bool = False) -> list[Outcome]:
        """Run programs, as many at once as there are workers; return outcomes in their order."""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda source: self.run(source, compat), sources))

    def _in_monty(self, source: str) -> Outcome | None:
        """Run a program in monty; None if it cannot be said there what comes of it."""
        import pydantic_monty

        limits = {
            "max_feed_duration_secs": self.limits.seconds,
            "max_memory": self.limits.memory,
            "max_total_sleep_secs": 0.0,
        }
        try:
            with self._pool().checkout(limits=limits) as session:
                printed = pydantic_monty.CollectString(max_bytes=PRINTED)
                code = f"import math\n{source}\n{_CALL}"
                number, text = session.feed_run(code, print_callback=printed)
        except pydantic_monty.MontyCrashedError as error:
            return Outcome(error=str(error))
        except pydantic_monty.MontyError as error:
            inner = error.exception()
            return None if isinstance(inner, CANNOT) else Outcome(error=f"{type(inner).__name__}")
        except (ValueError, TypeError, OSError):  # a text that cannot be sent, no monty to start
            return None
        return _outcome(number, text)

    def _pool(self) -> Any:
        import pydantic_monty

        with self._lock:
            if self._monty is None:
                pool = pydantic_monty.Monty(
                    min_processes=0,
                    max_processes=self.workers,
                    request_timeout=self.limits.seconds + GRACE,
                )
                self._monty = pool.__enter__()
            return self._monty


class _Worker:
    """One process that runs programs, started anew whenever it has died or hangs."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.has_sympy = False

    def run(self, source: str, compat: bool, limits: Limits) -> Outcome:
        """Run a program; a worker that does not answer in time is killed."""
        is_fresh = self.process is None or self.process.poll() is not None
        if is_fresh:
            self._start()
        loads = "sympy" in source and not self.has_sympy
        self.has_sympy |= loads
        request = {"source": source, "compat": compat, **vars(limits)}
        wait = limits.seconds + GRACE + (START if is_fresh or loads else 0.0)
        try:
            line = self._asked(json.dumps(request).encode() + b"\n", time.monotonic() + wait)
            found = json.loads(line)
        except (OSError, ValueError) as error:
            self.kill()
            return Outcome(error=f"the worker died or did not answer: {error}")
        if "error" in found:
            return Outcome(error=found["error"])
        return _outcome(found["number"], found["text"])

    def _start(self) -> None:
        self.kill()
        self.has_sympy = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # No keys, no tokens; sets have one order, so that a program gives the same every time
            env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            cwd="/",
            start_new_session=True,
        )
        os.set_blocking(self.process.stdin.fileno(), False)

    def _asked(self, request: bytes, deadline: float) -> bytes:
        """Send a request and return the line that answers it.

        Raises:
            OSError: If the worker is dead or late.
        """
        to, back = self.process.stdin.fileno(), self.process.stdout.fileno()
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("out of time")
            ready, free, _ = select.select([back], [to] if request else [], [], left)
            if free:
                request = request[os.write(to, request[: 1 << 16]) :]
            if ready:
                piece = os.read(back, 1 << 16)
                if not piece:
                    raise BrokenPipeError("it is dead")
                line += piece
        return line

    def kill(self) -> None:
        """End the process and its group."""
        process, self.process = self.process, None
        if process is None:
            return
        for end in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
            with contextlib.suppress(OSError):
                end()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()


def _outcome(number: Any, text: Any) -> Outcome:
    """Return what a program gave; it was told by its own process, so nothing is certain."""
    try:
        told = str(text).encode("utf-8", "replace").decode("utf-8")  # half a character is none
        return Outcome(None if number is None else float(number), told)
    except (TypeError, ValueError):
        return Outcome(error="no result")


def has_monty() -> bool:
    """Return whether pydantic-monty is installed."""
    return find_spec("pydantic_monty") is not None


_SHARED: dict[tuple[int, Limits], Programs] = {}


def processors() -> int:
    """Return how many programs run at once: the processors this process may use, at most 8."""
    known = getattr(os, "sched_getaffinity", None)
    return max(1, min(8, len(known(0)) if known else os.cpu_count() or 1))


def shared(limits: Limits | None = None) -> Programs:
    """Return the workers of this process, which rewards share; they end with it.

    Args:
        limits: What a program may use; each has workers of its own.

    Raises:
        RecipeError: If this system can start none.
    """
    if not hasattr(os, "fork"):
        raise RecipeError(
            "Programs need a system with fork (Linux, macOS).", "Use answers in words instead."
        )
    key = os.getpid(), limits or Limits()
    own = _SHARED.get(key)
    if own is None:
        own = _SHARED[key] = Programs(key[1], processors())
        atexit.register(own.close)
    return own
