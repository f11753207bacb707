"""The process that runs programs: started by `reftune.rewards.programs`, never imported.

It reads requests as JSON lines and answers each with one line. Every program runs in a child of its
own, made by a fork, under what the system offers of: a seccomp filter that knows no call but those
that compute, no privileges, limits of memory, CPU time, processes and files, no open files but
/dev/null and the pipe for its result, and an audit hook that refuses what Python itself announces.
The child's process group is killed when its time is over, and when it is done.

Left out on purpose: NumPy, whose threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

PRELOADED = (
    *("bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal"),
    *("fractions", "functools", "heapq", "itertools", "math", "numbers", "operator", "random"),
    *("re", "statistics", "string", "typing"),
)
"""Modules a program can import: afterwards no file can be read."""
LONGEST = 1000
"""Characters of a result as text."""
MOST = 1 << 16
"""Bytes of an answer; a child that writes more is killed."""
NOBODY = 65534
REFUSED = (
    *("open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "fcntl.", "mmap.", "pty."),
    *("signal.", "resource.", "tempfile.", "glob.", "webbrowser.", "ftplib.", "urllib.", "http."),
    *("sqlite3.", "winreg.", "msvcrt.", "syslog.", "sys._getframe", "sys.addaudithook", "code.__"),
)
"""Beginnings of the names of audit events that are refused."""

# Linux: numbers of the calls that computing needs, by machine.
_CALLS = {
    "x86_64": (
        0xC000003E,
        (
            *(0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 35, 39, 60, 96, 98, 100, 131),
            *(186, 202, 219, 228, 229, 230, 231, 318, 324, 334),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(57, 62, 63, 64, 80, 93, 94, 98, 101, 113, 114, 115, 124, 128, 132, 134, 135, 139),
            *(153, 165, 169, 172, 178, 214, 215, 216, 222, 226, 233, 278, 283, 293),
        ),
    ),
}


def main() -> None:
    """Answer requests until standard input ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    libc = ctypes.CDLL(None, use_errno=True)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "sympy" in request["source"] and "sympy" not in sys.modules:
            _load_sympy()
        answers.write(json.dumps(answer(request, libc)) + "\n")
        answers.flush()


def _load_sympy() -> None:
    """Import sympy with the parts that it imports when they are first used."""
    with contextlib.suppress(Exception):
        sympy = importlib.import_module("sympy")
        x = sympy.Symbol("x")
        sympy.solve(sympy.Eq(x**2 + 2 * x, 3), x)
        y = sympy.Symbol("y")
        sympy.solve((sympy.Eq(x + y, 10), sympy.Eq(x - y, 2)), (x, y))
        float(sympy.simplify((x + 1) ** 2 - x**2).subs(x, 2).evalf())
    gc.freeze()


def answer(request: dict[str, Any], libc: Any) -> dict[str, Any]:
    """Run one program in a child; return what it wrote, or what went wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(request, writing, libc)
    os.close(writing)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # the child does it too; whoever is first
    found = _read(reading, time.monotonic() + request["seconds"])
    os.close(reading)
    _end(child)
    if found is None:
        return {"error": "out of time, or too long a result"}
    try:
        made = json.loads(found)
        number, text = made["number"], made["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"error": "no result"}
    is_number = number is None or isinstance(number, str)
    return {"number": number, "text": str(text)[:LONGEST]} if is_number else {"error": "no result"}


def _read(pipe: int, deadline: float) -> bytes | None:
    """Return all that comes until the other end closes; None if it is too late or too much."""
    found = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return None
        piece = os.read(pipe, MOST)
        if not piece:
            return found
        found += piece
        if len(found) > MOST:
            return None


def _end(child: int) -> None:
    """Kill a child and all that is left of its group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(child, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)


# In the child


def _be_child(request: dict[str, Any], pipe: int, libc: Any) -> None:
    """Give up what is not needed, run the program, write its result, and leave."""
    try:
        os.setpgid(0, 0)
        for handle in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), handle)
        os.dup2(pipe, 3)
        os.closerange(4, 4096)
        sys.stdin = sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        importlib.import_module("random").seed(0)  # a program gives the same every time
        confine(request["memory"], request["seconds"], libc)
        made = json.dumps(result_of(request["source"], request["compat"]))
        os.write(3, made.encode("ascii"))
    except BaseException:  # whatever the program raises, SystemExit and MemoryError among it
        pass
    finally:
        os._exit(0)


def result_of(source: str, compat: bool) -> dict[str, str | None]:
    """Run a program and call its `solution`; return its value as number and as text.

    Args:
        source: The program.
        compat: With two namespaces, so that `solution` sees nothing from beside it (as published).
    """
    space: dict[str, Any] = {"__name__": "program", "math": math}
    if "sympy" in sys.modules:
        space["sympy"] = sys.modules["sympy"]
    names = {} if compat else space
    exec(compile(source, "<program>", "exec"), space, names)
    value = names["solution"]()
    try:
        number = repr(float(value))
    except Exception:
        number = None
    return {"number": number, "text": str(value)[:LONGEST]}


def confine(memory: int, seconds: float, libc: Any) -> None:
    """Take away what a program has no need of; what a system lacks is left out.

    Args:
        memory: Bytes on top of what Python itself has.
        seconds: CPU time, rounded up.
        libc: The C library.
    """
    cpu = int(seconds) + 1
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (4, 4),
        resource.RLIMIT_NPROC: (0, 0),
        resource.RLIMIT_AS: (_held() + memory,) * 2,
    }
    for kind, pair in limits.items():
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, pair)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    if sys.platform == "linux":
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the worker
        _filter(libc)
    sys.addaudithook(_refuse)


def _held() -> int:
    """Return the address space this process has, in bytes."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 30


def _filter(libc: Any) -> bool:
    """Let the kernel refuse every call that is not known to compute; say whether it will."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return False
    machine, calls = known
    load, equal, answer_with = 0x20, 0x15, 0x06
    lines = [
        (load, 0, 0, 4),  # the machine the call is for
        (equal, 1, 0, machine),
        (answer_with, 0, 0, 0x80000000),  # another one: kill
        (load, 0, 0, 0),  # the number of the call
        *((equal, len(calls) - i, 0, call) for i, call in enumerate(calls)),
        (answer_with, 0, 0, 0x00050001),  # EPERM
        (answer_with, 0, 0, 0x7FFF0000),  # allowed
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(held))
    no_new_privileges = libc.prctl(38, 1, 0, 0, 0) == 0
    return no_new_privileges and libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0) == 0


def _refuse(event: str, arguments: object) -> None:
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not for programs")


if __name__ == "__main__":
    main()
