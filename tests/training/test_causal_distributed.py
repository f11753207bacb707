"""Causal caching in two processes: the walk of one, one folder of constants, resume, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_distributed import assert_close, launch
from two_processes_causal import SEVENTEEN, WALKS, walk

from reftune.training.constants import DiskStore

pytestmark = pytest.mark.slow


def found(folder: Path, how: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / how.replace(" ", "-") / f"found{rank}.safetensors")


def test_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    launch(Path(__file__).with_name("two_processes_causal.py"), two)
    assert {p.name for p in two.glob("done*")} == {"done0", "done1"}
    walk(one, 8, "off")
    plain = found(one, "off")
    assert len(plain["loss"]) == 6 and int(plain["world"]) == 1
    for how in WALKS:
        ours = [found(two, how, rank) for rank in (0, 1)]
        assert [int(values["world"]) for values in ours] == [2, 2]
        mode = {"off": 0, "recompute": 1}.get(how, 2)
        assert [int(values["mode"]) for values in ours] == [mode, mode]
        assert torch.allclose(plain["loss"], ours[0]["loss"], rtol=1e-5), how
        assert abs(float((plain["loss"] - ours[0]["loss"]).mean())) < 1e-5
        for values in ours:
            assert_close({k: v for k, v in plain.items() if k != "loss"}, values)

    # One folder: each process computed a part of it, and both found all of it in every step. What
    # is asked for besides are the blank rows of the process that had none left.
    for how in ("memory", "disk"):
        for rank in (0, 1):
            values = found(two, how, rank)
            assert int(values["kept"]) >= 2 * SEVENTEEN
            assert int(values["misses"]) <= 8, how
    files = DiskStore(1e9, two / "disk" / "constants")
    assert len(files) == 2 * SEVENTEEN and files.sealed
    assert all(files.get(key) is not None for key in files.files)
    assert not list((two / "disk" / "constants").glob("*.part"))
    full = DiskStore(1e9, two / "full-disk" / "constants")
    assert 0 < len(full) < 2 * SEVENTEEN and full.sealed

    for how in ("memory", "full disk"):
        straight, resumed = found(two, how), found(two, f"{how} broken")
        names = [name for name in straight if "reft_" in name]
        assert names and all(torch.equal(straight[n], resumed[n]) for n in names), how
