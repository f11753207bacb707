"""Hostile programs: whoever runs them survives each, and gets nothing for it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reftune.errors import RecipeError
from reftune.rewards import program_worker
from reftune.rewards.programs import WORKER, Limits, Programs, has_monty

LIMITS = Limits(seconds=1.5, memory=128 * 2**20)
BACKENDS = [False, pytest.param(True, marks=pytest.mark.skipif(not has_monty(), reason="no monty"))]


@pytest.fixture(scope="module", params=BACKENDS, ids=["worker", "monty"])
def programs(request):
    with Programs(LIMITS, workers=1, monty=request.param) as found:
        yield found


def survives(programs):
    """Say whether the next program is run as if nothing had happened."""
    return programs.run("def solution():\n    return 6 * 7").number == 42


HOSTILE = {
    "endless loop": "while True:\n        pass",
    "endless call": "return 9 ** 9 ** 9 ** 9",
    "fork bomb": "import os\n    while True:\n        os.fork()",
    "fork bomb that hides": "import os\n    while True:\n        os.fork() or os.setsid()",
    "threads": "import threading\n    while True:\n        threading.Thread(target=input).start()",
    "memory bomb": "x = []\n    while True:\n        x.append('a' * 10**7)",
    "one large list": "return len([0] * 10**10)",
    "reads a file": "return len(open('/etc/passwd').read())",
    "reads memory": "return len(open('/proc/self/mem', 'rb').read(8))",
    "lists a folder": "import os\n    return len(os.listdir('/'))",
    "network": "import socket\n    socket.create_connection(('127.0.0.1', 9))\n    return 1",
    "socket alone": "import socket\n    return socket.socket().fileno()",
    "command": "import subprocess\n    return len(subprocess.run('ls').args)",
    "system": "import os\n    return os.system('true')",
    "kills its parent": "import os\n    os.kill(os.getppid(), 9)\n    return 1",
    "kills everybody": "import os\n    os.kill(-1, 9)\n    return 1",
    "kills its group": "import os\n    os.killpg(0, 9)\n    return 1",
    "kills itself": "import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)",
    "leaves": "import os\n    os._exit(0)",
    "leaves politely": "raise SystemExit(0)",
    "deep recursion": "import sys\n    sys.setrecursionlimit(10**9)\n    f = lambda n: f(n + 1)\n"
    "    return f(0)",
    "deep data": "x = []\n    for _ in range(10**6):\n        x = [x]\n    return float(repr(x))",
    "unpicklable": "return (lambda: 1)",
    "a class that lies": "class A:\n        def __float__(self):\n            raise SystemExit\n"
    "    return A()",
    "foreign code": "import ctypes\n    return ctypes.CDLL(None).getpid()",
    "a module that is none": "import numpy_of_mine\n    return 1",
    "nothing": "pass",
    "division": "return 1 / 0",
    "raises": "raise BaseException('no')",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs_give_nothing_and_break_nothing(programs, body):
    before = time.monotonic()
    found = programs.run(f"def solution():\n    {body}\n")
    assert found.number is None
    assert time.monotonic() - before < 25, "a program has 1.5 seconds; a worker may start anew"
    assert survives(programs)


@pytest.mark.parametrize(
    "body",
    ["for _ in range(10**4):\n        print('x' * 10**4)\n    return 7", "return 'x' * 10**6"],
    ids=["printed", "returned"],
)
def test_huge_outputs_are_cut(programs, body):
    found = programs.run(f"def solution():\n    {body}\n")
    assert found.text is None or len(found.text) <= 1000
    assert survives(programs)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "def solution(:",
        "solution = 3",
        "def other():\n    return 1",
        "\x00",
        "def solution():\n    return '\udc80'",
        "(" * 10**5,
        "x = " + "-" * 10**5 + "1",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "while True: pass",
    ],
    ids=range(11),
)
def test_texts_that_are_no_programs_give_nothing(programs, source):
    found = programs.run(source)
    assert found.number is None and (found.text is None or found.text.isprintable())
    assert survives(programs)


def test_a_file_is_not_written(programs, tmp_path):
    tmp_path.chmod(0o777)
    file = tmp_path / "evil"
    programs.run(f"def solution():\n    open({str(file)!r}, 'w').write('x')\n    return 1\n")
    os_ = f"import os\ndef solution():\n    return os.open({str(file)!r}, os.O_CREAT | os.O_RDWR)\n"
    assert programs.run(os_).number is None and not file.exists()


def test_no_secret_is_in_the_environment(programs, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    found = programs.run("import os\ndef solution():\n    return str(dict(os.environ))\n")
    assert "secret" not in (found.text or "")


# What programs can do


@pytest.mark.parametrize(
    ("source", "number", "text"),
    [
        ("def solution():\n    '''How many?'''\n    a = 3\n    return a * 2", 6.0, "6"),
        ("import math\ndef solution():\n    return math.ceil(2.5)", 3.0, "3"),
        ("def solution():\n    return math.floor(2.5)", 2.0, "2"),
        ("from fractions import Fraction\ndef solution():\n    return Fraction(1, 4)", 0.25, "1/4"),
        ("def twice(x):\n    return 2 * x\ndef solution():\n    return twice(4)", 8.0, "8"),
        ("def g():\n    yield 2\ndef solution():\n    return sum(g())", 2.0, "2"),
        ("def solution():\n    return 'b'", None, "b"),
        ("def solution():\n    return '12'", 12.0, "12"),
        ("def solution():\n    return True", 1.0, "True"),
        ("def solution():\n    return float('inf')", float("inf"), "inf"),
        ("import datetime\ndef solution():\n    return datetime.date(2020, 1, 2).day", 2.0, "2"),
    ],
    ids=range(11),
)
def test_programs_give_numbers_and_texts(programs, source, number, text):
    found = programs.run(source)
    assert (found.number, found.text, found.error) == (number, text, "")


def test_sympy_is_there_where_it_is_named():
    pytest.importorskip("sympy")
    equation = "def solution():\n    x = sympy.Symbol('x')\n    return sympy.solve(2 * x - 3, x)[0]"
    with Programs(Limits(5.0, 256 * 2**20), workers=1) as programs:
        assert programs.run(equation).number == 1.5
        assert programs.run("from sympy import Rational\n" + equation).text == "3/2"


def test_programs_run_together_and_answer_in_order():
    sources = [f"def solution():\n    return {i}" for i in range(12)]
    sources[3] = "def solution():\n    while True: pass"
    with Programs(Limits(1.0), workers=3, monty=False) as programs:
        found = programs.run_all(sources)
    assert [o.number for o in found] == [None if i == 3 else float(i) for i in range(12)]


def test_one_program_leaves_nothing_to_the_next(programs):
    programs.run("import math\ndef solution():\n    math.pi = 3\n    return math.pi")
    programs.run("import builtins\nbuiltins.abs = None\ndef solution():\n    return 1")
    found = programs.run("def solution():\n    return abs(math.pi)")
    assert found.number == pytest.approx(3.14159, abs=1e-4)


def test_a_program_gives_the_same_every_time():
    """Neither chance nor the order of sets tells workers apart; a resumed run scores alike."""
    source = "import random\ndef solution():\n    order = ''.join({'ab', 'cd', 'ef', 'gh', 'ij'})\n"
    source += "    return order + str(random.random())"
    found = set()
    for _ in range(3):
        with Programs(LIMITS, workers=1, monty=False) as programs:
            found |= {programs.run(source).text, programs.run(source).text}
    assert len(found) == 1 and found.pop()[:10].isalpha()


# Workers


def test_a_worker_that_dies_is_replaced():
    with Programs(LIMITS, workers=1, monty=False) as programs:
        assert survives(programs)
        worker = programs._idle.queue[0]
        first = worker.process
        first.kill()
        first.wait()
        assert survives(programs) and worker.process is not first
        second = worker.process
        os.kill(second.pid, 19)  # it hangs
        found = programs.run("def solution():\n    return 1")
        assert "did not answer" in found.error and second.poll() is not None
        assert survives(programs)
    assert worker.process is None


def test_nothing_is_left_behind():
    """Children that a program could have made, and workers, are gone afterwards."""
    with Programs(LIMITS, workers=2, monty=False) as programs:
        programs.run_all(["import os\ndef solution():\n    while True: os.fork()"] * 2)
        groups = [worker.process.pid for worker in programs._idle.queue]
    assert len(groups) == 2
    for group in groups:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_limits_that_let_nothing_run_are_refused():
    for given in ({"seconds": 0}, {"seconds": float("inf")}, {"memory": 0}):
        with pytest.raises(RecipeError, match="let no program run"):
            Limits(**given)
    with pytest.raises(RecipeError, match="0 workers let no program run"):
        Programs(workers=0)


# Layers, one by one: each holds where the others would fail


def in_a_child(code):
    """Run code in a process of its own, beside the module of the worker; return what it prints."""
    head = f"import sys, os, ctypes\nsys.path.insert(0, {str(WORKER.parent)!r})\n"
    head += "import program_worker as w\nlibc = ctypes.CDLL(None)\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


ATTEMPTS = """
def attempt(*calls):
    for call in calls:
        try:
            call()
            os.write(1, b"done\\n")
        except OSError as error:
            os.write(1, type(error).__name__.encode() + b"\\n")
import socket
"""


def test_the_kernel_refuses_what_does_not_compute():
    if sys.platform != "linux" or not _has_filter():
        pytest.skip("no seccomp here")
    calls = "os.fork, lambda: os.open('/etc/passwd', 0), lambda: os.kill(os.getppid(), 0), "
    calls += "socket.socket, lambda: os.setpgid(0, 0), lambda: os.unlink('/nowhere'), "
    calls += "lambda: os.execv('/bin/true', ['true']), lambda: bytearray(10**6)"
    found = in_a_child(ATTEMPTS + f"assert w._filter(libc)\nattempt({calls})")
    assert found == ["PermissionError"] * 7 + ["done"]


def _has_filter():
    code = "os.write(1, b'yes' if w._filter(libc) else b'no')"
    return in_a_child(code) == ["yes"]


def test_python_refuses_what_it_announces():
    calls = "os.fork, lambda: open('/etc/passwd'), lambda: os.kill(os.getppid(), 0), "
    calls += "socket.socket, lambda: os.system('true'), lambda: os.listdir('/'), "
    calls += "lambda: ctypes.CDLL(None), lambda: sum(range(10))"
    found = in_a_child(ATTEMPTS + f"sys.addaudithook(w._refuse)\nattempt({calls})")
    assert found == ["PermissionError"] * 7 + ["done"]


def test_limits_hold_without_filter_and_hook():
    code = "w._filter = lambda libc: False\nw._refuse = lambda *a: None\nimport resource\n"
    code += "import sys\nw.confine(64 * 2**20, 1.0, libc)\n"
    code += "try:\n    bytearray(2**30)\n    os.write(1, b'memory ')\n"
    code += "except MemoryError:\n    os.write(1, b'MemoryError ')\n"
    code += "try:\n    os.fork() or os._exit(0)\n    os.write(1, b'forked ')\n"
    code += "except OSError:\n    os.write(1, b'BlockingIOError ')\n"
    code += "os.write(1, str(resource.getrlimit(resource.RLIMIT_CPU)[1]).encode())"
    wanted = ["MemoryError", "BlockingIOError", "2"]
    found = in_a_child(code)
    assert found[2] == wanted[2]
    if sys.platform == "linux":
        assert found == wanted


def test_the_group_of_a_child_is_killed():
    """Without filter, hook and limits a program can fork; what it makes dies with it."""
    code = "w.confine = lambda *a: None\nimport time\n"
    code += "source = 'import os, time\\ndef solution():\\n    if os.fork() == 0:\\n'\n"
    code += "source += '        time.sleep(60)\\n    return os.getpgid(0)'\n"
    code += "request = {'source': source, 'compat': False, 'seconds': 1.0, 'memory': 2**30}\n"
    code += "found = w.answer(request, libc)\nprint(found.get('error', 'none').split()[0])\n"
    code += "import glob\ntime.sleep(0.2)\n"
    code += "left = [p for p in glob.glob('/proc/[0-9]*/stat') if str(os.getpid()) == "
    code += "open(p).read().rsplit(')', 1)[1].split()[1]]\nprint(len(left))"
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
    assert in_a_child(code) == ["out", "0"], "the pipe stays open in the grandchild"


@pytest.mark.quick
def test_the_worker_imports_nothing_of_ours():
    text = WORKER.read_text("utf-8")
    assert "import reftune" not in text and "from reftune" not in text
    assert ctypes.CDLL(None) and program_worker.result_of("solution = lambda: 2", False) == {
        "number": "2.0",
        "text": "2",
    }
