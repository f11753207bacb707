"""Two processes walk the same way as one with the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import walk

from reftune.config.loader import dump
from reftune.config.recipe import AdapterSpec
from reftune.report.model import Report
from reftune.training.stages import train

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(*arguments):
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["ACCELERATE_USE_CPU"] = "true"
    paths = [str(root / "src"), str(root / "tests"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]  # torchrun, on CPU
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port())]
    command += [str(Path(__file__).with_name("two_processes.py")), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one, two):
    for key in one:
        if "reft_" in key:
            assert torch.allclose(one[key], two[key], atol=2e-5), key


def test_two_processes_equal_one(recipe, with_stage, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    plain = with_stage(recipe, adapter=AdapterSpec(options={"rank": 2}), keep="best")
    shared = replace(plain, name="shared")
    (tmp_path / "shared.yaml").write_text(dump(shared))
    launch(two, tmp_path / "shared.yaml")
    for count in (22, 17):  # 17: in the last step of an epoch one process has no row at all
        walk(one, 8, count)
        a, b = (load_file(place / f"{count}.safetensors") for place in (one, two))
        assert int(a["world"]) == 1 and int(b["world"]) == 2
        assert torch.allclose(a["loss"], b["loss"], rtol=1e-5)
        assert abs(float((a["loss"] - b["loss"]).mean())) < 1e-5
        assert torch.allclose(a["eval_loss"], b["eval_loss"], rtol=1e-5)
        assert torch.equal(a["tokens"], b["tokens"])
        assert_close(a, b)
    assert {p.name for p in two.glob("done*")} == {"done0", "done1"}

    a, b = (two / n / "adapter_model.safetensors" for n in ("plain", "sharded"))
    assert a.read_bytes() == b.read_bytes()

    train(plain, progress=False)
    folders = [Path(recipe.output) / name for name in (plain.name, "shared")]
    assert_close(*(load_file(f / "adapter" / "adapter_model.safetensors") for f in folders))
    reports = [Report.read(folder) for folder in folders]
    assert reports[0].figures.keys() == reports[1].figures.keys()
    assert reports[0].steps == reports[1].steps == 6
