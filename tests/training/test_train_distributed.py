"""Two processes walk the same way as one with the same global batch.

They are started by the command of the guide.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from docs_parts import ROOT, commands
from safetensors.torch import load_file
from two_processes import WALKS, walk

from reftune.cli.train import train as verb
from reftune.config.loader import dump
from reftune.config.recipe import AdapterSpec
from reftune.report.model import Report
from reftune.training.stages import train

pytestmark = pytest.mark.slow


def launch(*program):
    """Start two processes as the guide does, of another program than its own."""
    found = {c.words for c in commands() if c.words[0] == "accelerate" and "2" in c.words}
    assert len(found) == 1, "the documentation has one way to start two processes"
    words = list(found.pop())
    assert words[-4:] == ["-m", "reftune", "train", "my.yaml"]
    assert " ".join(words) in verb.__doc__
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(ROOT / "src"), str(ROOT / "tests"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.accelerate_cli"]
    command += [*words[1:-4], *map(str, program)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one, two):
    for key in one:
        if "reft_" in key:
            assert torch.allclose(one[key], two[key], atol=2e-5), key


def test_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    launch(Path(__file__).with_name("two_processes.py"), two)
    for name, count in WALKS:
        walk(one, 8, count, name)
        a, b = (load_file(place / f"{name}{count}.safetensors") for place in (one, two))
        assert int(a["world"]) == 1 and int(b["world"]) == 2
        assert torch.allclose(a["loss"], b["loss"], rtol=1e-5)
        assert abs(float((a["loss"] - b["loss"]).mean())) < 1e-5
        assert torch.allclose(a["eval_loss"], b["eval_loss"], rtol=1e-5)
        assert torch.equal(a["tokens"], b["tokens"])
        assert torch.allclose(a["bias_norm"], b["bias_norm"], rtol=1e-4)
        assert torch.allclose(a["omega"], b["omega"], rtol=1e-4)
        assert torch.equal(a["restraint_acted"], b["restraint_acted"])
        assert bool(a["restraint_acted"].any()) == (name == "brep")
        assert_close(a, b)
    assert {p.name for p in two.glob("done*")} == {"done0", "done1"}

    a, b = (two / n / "adapter_model.safetensors" for n in ("plain", "sharded"))
    assert a.read_bytes() == b.read_bytes()


def test_the_documented_command_runs_two_processes(recipe, with_stage, tmp_path):
    plain = with_stage(recipe, adapter=AdapterSpec(options={"rank": 2}), keep="best")
    shared = replace(plain, name="shared")
    (tmp_path / "shared.yaml").write_text(dump(shared))
    launch("-m", "reftune", "train", tmp_path / "shared.yaml")
    train(plain, progress=False)
    folders = [Path(recipe.output) / name for name in (plain.name, "shared")]
    assert_close(*(load_file(f / "adapter" / "adapter_model.safetensors") for f in folders))
    reports = [Report.read(folder) for folder in folders]
    assert reports[0].figures.keys() == reports[1].figures.keys()
    assert reports[0].steps == reports[1].steps == 6
    facts = json.loads((folders[1] / "environment.json").read_text())
    assert facts["processes"] == 2
