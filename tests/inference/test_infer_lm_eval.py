"""The lm-evaluation-harness model: a clear error without it, right positions with it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import tiny_folder, tiny_llama, tiny_tokenizer

import reftune
from reftune.errors import ReftuneError
from reftune.inference import choose, generate
from reftune.inference import lm_eval as seam

installed = importlib.util.find_spec("lm_eval") is not None
needs = pytest.mark.skipif(not installed, reason="lm-eval is not installed (extra eval)")


def adapted(positions="f1+l2"):
    config = reftune.ReftConfig(reftune.LoreftConfig(rank=4), positions=positions)
    model = reftune.get_peft_model(tiny_llama(seed=3), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "reft_" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.quick
def test_a_missing_harness_names_the_extra(monkeypatch):
    seam.lm_eval_model.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ReftuneError, match=r"extra eval; .* pip install -e '\.\[eval\]'"):
        seam.lm_eval_model()


@pytest.mark.quick
def test_importing_the_seam_is_light():
    code = "import reftune.inference.lm_eval, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.quick
def test_what_to_load_must_be_said():
    with pytest.raises(ReftuneError, match="needs an adapter or a base model"):
        seam.load(None, None, None)
    with pytest.raises(ReftuneError, match="needs its tokenizer"):
        seam.load(None, tiny_llama(), None)


@pytest.mark.quick
def test_long_prompts_are_cut_from_the_left_like_the_harness_does():
    ask = seam._fitted(list(range(10)), [90, 91, 92], max_len=6)
    assert (ask.prompt, ask.answer) == ((6, 7, 8, 9), (90, 91, 92))  # 4 + 3 - 1 = 6 tokens run


def write_tasks(folder):
    """Write a choice task and a generated one with their rows; return the rows."""
    rows = [{"q": f"{a}+{b}=", "a": a + b} for a in range(2, 6) for b in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder}/rows.jsonl\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
    )
    (folder / "sums.yaml").write_text(
        head + "task: sums\noutput_type: multiple_choice\ndoc_to_target: '{{(a - 2) % 3}}'\n"
        "doc_to_choice: ['4', '15', 'x y']\ntarget_delimiter: ''\n"
    )
    (folder / "free.yaml").write_text(
        head + "task: free\noutput_type: generate_until\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['|'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
    )
    return rows


@needs
def test_a_task_through_the_harness(tmp_path):
    """One choice task and one generated one from local files, against choose and generate."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = write_tasks(tmp_path)
    model, tokenizer = adapted(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "adapter")
    harness = seam.lm_eval_model()(
        adapter=str(tmp_path / "adapter"), pretrained=tiny_llama(seed=3), tokenizer=tokenizer,
        batch_size=5,
    )  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=harness, tasks=["sums", "free"], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    prompts = [row["q"] for row in rows]
    expected = choose(model, tokenizer, prompts, ["4", "15", "x y"])
    for sample in found["samples"]["sums"]:
        got = [float(answer[0][0]) for answer in sample["resps"]]
        assert got == pytest.approx(expected[sample["doc_id"]], abs=1e-4)
    texts = generate(model, tokenizer, prompts, max_new_tokens=6, stop=["|"])
    assert [s["resps"][0][0] for s in found["samples"]["free"]] == [text[0] for text in texts]
    plain = choose(tiny_llama(seed=3), tokenizer, prompts, ["4", "15", "x y"])
    assert abs(plain[0][0] - expected[0][0]) > 1e-3


@needs
@pytest.mark.slow
def test_the_documented_command_runs_the_harness(tmp_path):
    """An artefact that names its base by a folder, through `python -m`."""
    rows = write_tasks(tmp_path)
    base = tiny_folder(tmp_path / "base", seed=3)
    model, tokenizer = reftune.load_base(str(base))
    config = reftune.ReftConfig(reftune.LoreftConfig(rank=4), positions="f1+l2")
    reftune.save(reftune.get_peft_model(model, config), tmp_path / "adapter")
    command = [sys.executable, "-m", "reftune.inference.lm_eval", "--model", "reftune"]
    command += ["--model_args", f"adapter={tmp_path / 'adapter'}", "--tasks", "sums"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    loaded, _ = reftune.load(tmp_path / "adapter")
    scores = choose(loaded, tokenizer, [row["q"] for row in rows], ["4", "15", "x y"])
    right = [max(range(3), key=s.__getitem__) == (r["a"] - 2) % 3 for s, r in zip(scores, rows)]
    assert results["results"]["sums"]["acc,none"] == pytest.approx(sum(right) / len(rows))
