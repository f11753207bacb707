"""The benchmarks run, measure what they say, and fail with a clear message."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from reftune.report.measured import measured_rows

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def run(script: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / script), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_step_prints_a_row_for_every_contender():
    done = run("step.py", "--d", "128", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    published = {row.name: row for row in measured_rows(result, "speed", "command")}
    ours = published["speed/128/loreft r4, all layers:ratio_to_lora"]
    assert ours.bar == "<= 0.75" and ours.holds in (True, False) and ours.versions["torch"]
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 9
    for row in rows.values():
        assert row["seconds"] > 0 and row["peak_bytes"] > 0
        assert {"ratio_to_lora", "ratio_to_base", "ratio_to_pyreft"} <= row.keys()
    assert rows["lora r8, usual path"]["ratio_to_lora"] == 1.0
    assert rows["decode, base"]["ratio_to_base"] == 1.0
    assert rows["loreft r4, all layers"]["trainable"] == 4 * (2 * 4 * 128 + 4)
    lean, usual = rows["lora r8, label logits"], rows["lora r8, usual path"]
    assert lean["peak_bytes"] < usual["peak_bytes"] < rows["full, usual path"]["peak_bytes"]
    assert "no --pyreft-python given" in result["skipped"]["pyreft loreft r4, all layers"]
    by_goal = {(goal["name"], goal["column"]): goal["holds"] for goal in result["goals"]}
    assert by_goal["loreft r4, all layers", "ratio_to_pyreft"] is None
    assert by_goal["loreft r4, all layers", "ratio_to_lora"] in (True, False)


def test_wrong_options_are_named():
    unknown = run("step.py", "--d", "77")
    assert unknown.returncode == 2 and "--d 77. Known: 128, 512, 1024" in unknown.stderr
    missing = run("parity_pyreft.py", "--pyreft-python", "/no/such/python", "--quick")
    assert missing.returncode == 1 and "/no/such/python cannot be started" in missing.stderr
    assert "Traceback" not in missing.stderr + unknown.stderr


@pytest.mark.skipif(find_spec("pyreft") is not None, reason="pyreft is installed here")
def test_an_environment_without_pyreft_is_explained():
    done = run("parity_pyreft.py", "--pyreft-python", sys.executable, "--quick")
    assert done.returncode == 1
    assert "No module named 'pyreft'" in done.stderr and "pip install" in done.stderr


def test_commands_beside_figures_name_no_path_of_this_machine():
    from harness import command

    argv = ["--d", "512", "--publish", "--pyreft-python", "/home/me/x/bin/python", "--quick"]
    expected = "python benchmarks/step.py --d 512 --pyreft-python pyreft-env/bin/python --quick"
    assert command("benchmarks/step.py", argv) == expected
    joined = command("benchmarks/step.py", ["--pyreft-python=/home/me/bin/python"])
    assert joined == "python benchmarks/step.py --pyreft-python=pyreft-env/bin/python"


def test_decay_leaves_our_rotation_where_it_is():
    from harness import Settings
    from parity_pyreft import DECAYED, Ours

    settings = Settings(shape="128", rows=1, width=16, num_labels=2, prefix=1, suffix=1)
    weights = [
        {
            "W": torch.zeros(4, 128),
            "b": torch.zeros(4),
            "R": torch.linalg.qr(torch.randn(128, 4))[0].T,
        }
        for _ in range(4)
    ]
    ours = Ours(settings, weights, 0.0, False)
    free = ours.interventions()[0].reft_rotation.detach().clone()
    assert ours.decay(lr=1e-1, weight_decay=1.0) <= DECAYED
    assert torch.allclose(ours.interventions()[0].reft_rotation, 0.9 * free)


def test_what_the_benchmarks_print_can_be_published():
    row = {"name": "a", "d": "128", "seconds": 1.0, "peak_bytes": 2, "ratio_to_lora": 0.5}
    from step import judge

    result = {"rows": [row], "goals": judge([row]), "settings": {"d": "128"}, "skipped": {"b": "c"}}
    names = [found.name for found in measured_rows(result, "speed", "command")]
    assert names == [
        "speed/128/a",
        "speed/128/a:peak_bytes",
        "speed/128/a:ratio_to_lora",
        "speed/128/b",
    ]


def test_peak_counts_what_is_alive_at_once():
    from harness import held_bytes, peak_bytes

    layer = torch.nn.Linear(256, 256, bias=False)
    rows = torch.randn(1024, 256)

    def step() -> None:
        with torch.no_grad():
            first = layer(rows)  # 1 MiB
            second = first + 1  # another
            del first
            second.mul_(2)

    step()
    assert held_bytes([layer]) == 256 * 256 * 4
    expected = 256 * 256 * 4 + 2 * 1024 * 256 * 4
    assert peak_bytes(step, [layer], None) == pytest.approx(expected, abs=64)  # and scalars


def test_held_bytes_count_gradients_state_and_shared_weights_once():
    from harness import held_bytes, sharing

    layer = torch.nn.Linear(64, 64, bias=False)
    twin = sharing(layer)
    assert twin.weight is not layer.weight
    assert twin.weight.data_ptr() == layer.weight.data_ptr()
    assert held_bytes([layer, twin]) == 64 * 64 * 4
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 64)).sum().backward()
    optimiser.step()
    assert held_bytes([layer], optimiser) == pytest.approx(4 * 64 * 64 * 4, abs=8)


def test_turns_rotate_and_ratios_pair_rounds():
    from harness import take_turns

    order, clock = [], {"a": iter([9.0, 1.0, 2.0, 30.0]), "b": iter([9.0, 2.0, 4.0, 60.0])}

    def named(name):
        def step() -> float:
            order.append(name)
            return next(clock[name])

        return step

    samples = take_turns({"a": named("a"), "b": named("b")}, rounds=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert samples.median("b") == 4.0
    assert samples.ratio("b", "a") == 2.0  # also in the round where the machine was slow
    assert samples.ratio("b", "pyreft") is None


def test_batches_put_labels_at_the_end_of_each_row():
    from harness import Settings, locations, random_batch

    settings = Settings(rows=2, width=64, num_labels=8, ragged=True)
    batch = random_batch(settings)
    labelled = (batch["labels"] != -100).nonzero()[:, 1].reshape(2, 8)
    assert labelled[0].tolist() == list(range(56, 64))
    assert labelled[1].tolist() == list(range(53, 61))
    assert batch["attention_mask"].sum(1).tolist() == [64, 61]
    assert locations(settings)[1] == [*range(7), *range(46, 53)]
    assert torch.equal(random_batch(settings)["input_ids"], batch["input_ids"])
