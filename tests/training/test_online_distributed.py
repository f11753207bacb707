"""Two processes on fixed answers walk as one does, also where one of them has no question."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_distributed import launch
from two_processes_online import NAMES, walk

pytestmark = pytest.mark.slow


def test_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    launch(Path(__file__).with_name("two_processes_online.py"), two)
    for name in NAMES:
        walk(one, 8, name)
        alone = load_file(one / f"{name}0.safetensors")
        first, second = (load_file(two / f"{name}{rank}.safetensors") for rank in (0, 1))
        assert len(alone["loss"]) == 6 and alone.keys() == first.keys() == second.keys()
        assert torch.equal(alone["tokens"], first["tokens"])
        for key, value in first.items():
            assert torch.equal(value, second[key]), f"{key} differs between the processes"
            if not key.startswith("weight."):
                assert torch.allclose(alone[key][:1], value[:1], rtol=1e-6, atol=1e-6), key
            assert torch.allclose(alone[key], value, rtol=1e-3, atol=2e-5), key
    for rank in (0, 1):
        met = load_file(two / f"met{rank}.safetensors")
        assert met["rows"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert int(met["start"]) == rank
        assert float(met["sum"]) == 3.0
