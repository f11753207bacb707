"""The Makefile: every target does something, and a machine that lacks something is told what."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]
ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Makefile").read_text("utf-8")
GRIDS = sorted(path.stem for path in (ROOT / "recipes" / "grids").glob("*.yaml"))


def make(*words: str) -> subprocess.CompletedProcess:
    command = ["make", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def venv(tmp_path):
    """An environment that counts as installed."""
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / ".installed").touch()
    return f"VENV={folder}"


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_has_its_target(grid, venv):
    done = make("-n", f"results-{grid}", venv)
    assert done.returncode == 0, done.stderr
    assert f"-m reftune.report.grid recipes/grids/{grid}.yaml" in done.stdout


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("demo", "bin/reftune demo"),
        ("test", "-m pytest"),
        ("quick", "-m pytest -m quick"),
        ("lint", "-m ruff check ."),
        ("benchmarks", "benchmarks/step.py --quick"),
        ("results-demo", "results add runs/demo/report.json --section demo"),
        ("results-gates", "results add runs/gates.json --section gates"),
        ("results-speed", "benchmarks/step.py --d 512 1024 --publish"),
        ("results-parity", "benchmarks/parity_pyreft.py --pyreft-python pyreft-env/bin/python"),
    ],
)
def test_targets_do_what_they_say(target, expected, venv):
    done = make("-n", target, venv)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_phony_targets_have_rules_and_help_names_them():
    phony = re.search(r"^\.PHONY: (.+)$", TEXT, re.M)[1].split()
    rules = set(re.findall(r"^([\w-]+):(?!=)", TEXT, re.M))
    assert set(phony) <= rules
    named = {line.split()[0] for line in make("help").stdout.splitlines()}
    assert rules - {"help", "FORCE"} <= named


def fake_python(folder: Path, venv_fails: bool = False, too_old: bool = False) -> str:
    """Write an interpreter that has no torch and lacks what is said."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *version_info*) exit {int(too_old)};;\n'
        "*'import sys, torch'*) exit 1;; esac\n"
        f'for last; do :; done\nmkdir -p "$last/bin"\n'
        f'[ {int(venv_fails)} = 1 ] && exit 1\nln -s {sys.executable} "$last/bin/python"\n'
    )
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_an_old_python_is_named(tmp_path):
    done = make("install", f"VENV={tmp_path / 'new'}", fake_python(tmp_path, too_old=True))
    assert done.returncode != 0
    assert "Python 3.11 or newer. Name one: make install PYTHON=" in done.stderr


def test_without_the_venv_module_nothing_half_made_stays(tmp_path):
    done = make("install", f"VENV={tmp_path / 'new'}", fake_python(tmp_path, venv_fails=True))
    assert done.returncode != 0
    assert "Install the venv module" in done.stderr and "python3-venv" in done.stderr
    assert not (tmp_path / "new").exists()


def test_torch_is_chosen_once_and_then_kept(tmp_path):
    words = ("-n", "install", f"VENV={tmp_path / 'new'}", "TORCH=torch==2.13.0")
    lines = [line for line in make(*words).stdout.splitlines() if "pip install" in line]
    assert any('torch==2.13.0 "torch>=2.6"' in line for line in lines)
    assert lines[-1].endswith(f"-c {tmp_path / 'new'}/constraints.txt")
