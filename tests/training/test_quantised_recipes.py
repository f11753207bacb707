"""A recipe with a quantised base: a stack is trained, scored and asked, from the command line."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_folder

import reftune
from reftune.cli.main import main
from reftune.model import quantised

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", list(quantised.LIBRARIES))
def test_a_recipe_trains_a_stack_and_serves_it(kind, tmp_path, monkeypatch):
    library = quantised.LIBRARIES[kind]
    pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    base = tiny_folder(tmp_path / "base", dim=64)
    for name, first in (("rows", 0), ("val", 4), ("held", 8)):
        rows = [{"prompt": f"{i}+{i}=", "completion": f" {2 * i}"} for i in range(first, first + 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    stage = "\n    epochs: 3\n    batch_size: 4\n    optimiser: {lr: 1.0e-2}\n"
    (tmp_path / "my.yaml").write_text(
        f"model: {{name: {base}, quantize: {kind}}}\n"
        "task: {train: rows.jsonl, validation: val.jsonl, test: held.jsonl, max_new_tokens: 3}\n"
        "stages:\n"
        f"  - adapter: {{method: lora, rank: 2}}{stage}"
        f"  - adapter: {{method: loreft, name: second, rank: 2, positions: f1+l1}}{stage}"
        "threads: 1\nname: mine\n",
        "utf-8",
    )
    assert main(["train", "my.yaml"]) == 0
    lines = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses[-1] < losses[0]
    assert main(["eval", "runs/mine"]) == 0
    assert main(["generate", "runs/mine", "1+1=", "--max-new-tokens", "2"]) == 0
    model, _ = reftune.load("runs/mine")
    assert quantised.kind_of(model.get_base_model().config.quantization_config) == kind
