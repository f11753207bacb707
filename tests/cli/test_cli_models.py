"""Verbs on every kind of artefact: stacks, whole models, class heads, encoder-decoders."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from reftune.cli.models import load_any, shape
from reftune.model.artefact import trained_head

NONE = ("--set", "evaluation.split=none", "--set", "max_steps=1")


@pytest.fixture
def trained(cli, recipe_file):
    code, _, err = cli("train", recipe_file, *NONE)
    assert code == 0, err
    return Path("runs/sums")


@pytest.fixture
def labelled(recipe_file):
    """Options that turn the recipe into a classification of three kinds."""
    for name in ("rows", "val", "held"):
        rows = [{"text": f"{i} is", "label": "abc"[i % 3]} for i in range(18)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["model.head=classification", "objective=classification", "max_steps=1"]
    changes += ["task.text=text", "task.label=label"]
    return [word for change in changes for word in ("--set", change)]


def test_a_stack_on_top_of_a_model_with_an_adapter(cli, recipe_file, trained):
    more = ("--set", f"model.adapter={trained.resolve()}", "--name", "top")
    code, _, err = cli("train", recipe_file, *NONE, *more)
    assert code == 0, err
    assert Path("runs/top/stack/stack.json").is_file()
    code, out, err = cli("eval", "runs/top", "--size", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["report"]["figures"]["accuracy"]["n"] == 2
    assert cli("generate", "runs/top", "1+1=", "--base", "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize("method", ["full", "loreft"])
def test_classifiers_are_scored_with_their_own_head(cli, recipe_file, labelled, method):
    code, _, err = cli("train", recipe_file, *labelled, "--set", f"adapter.method={method}")
    assert code == 0, err
    figures = json.loads(Path("runs/sums/report.json").read_text())["figures"]
    code, out, err = cli("eval", "runs/sums", "--json")
    assert code == 0, err
    made = json.loads(out)["report"]["figures"]
    assert made["accuracy"]["mean"] == figures["adapter_accuracy"]["mean"]
    part = "model" if method == "full" else "adapter"
    shutil.copytree(f"runs/sums/{part}", "alone")
    model, _ = load_any("alone")
    assert type(model).__name__.startswith("Peft") == (method != "full")
    assert model.config.num_labels == 3
    code, _, err = cli("generate", "runs/sums", "a")
    assert code == 4 and "cannot generate text" in err


@pytest.mark.parametrize("method", ["full", "loreft", "lora"])
def test_a_head_it_was_not_trained_with_is_refused(cli, recipe_file, labelled, method):
    """Else its weights would be drawn at random, and scored as if they had been trained."""
    fields = ("--set", "task.prompt=text", "--set", "task.completion=label")
    how = ("--set", "evaluation.split=none", "--set", f"adapter.method={method}")
    for name, more in (("causal", (*fields, *NONE)), ("classes", labelled)):
        code, _, err = cli("train", recipe_file, *more, *how, "--name", name)
        assert code == 0, err
    part = "model" if method == "full" else "adapter"
    shutil.copytree(f"runs/causal/{part}", "alone")
    shutil.copytree(f"runs/classes/{part}", "alone-classes")
    assert trained_head("runs/causal") == trained_head("alone") == "causal"
    assert trained_head("runs/classes") == trained_head("alone-classes") == "classification"
    task = ("--task", "held.jsonl", "-o", "text=text", "-o", "label=label", "-o", "labels=[a,b,c]")
    alone = method != "full"  # a whole model by itself is a base model, which may get any head
    for name in ("runs/causal", "alone")[: 1 + alone]:
        code, _, err = cli("eval", name, *task, "--head", "classification")
        told = " ".join(err.split())
        assert code == 4 and f'"{name}" was trained with head causal; with head class' in told
        assert "the head would be untrained" in told and "Leave --head out" in told
        code, _, err = cli("eval", name, *task)
        told = " ".join(err.split())
        assert code == 4 and "as this task asks the head would be untrained" in told
        assert "with model.head: classification" in told
    for name in ("runs/classes", "alone-classes")[: 1 + alone]:
        code, _, err = cli("generate", name, "a", "--head", "causal")
        told = " ".join(err.split())
        assert code == 4 and f'"{name}" was trained with head classification; with' in told
        code, _, err = cli("eval", name, *task, "--head", "causal")
        assert code == 4 and "Leave --head out" in err
        code, _, err = cli("eval", name, *task, "--head", "classification")
        assert code == 0, err


@pytest.fixture
def t5_folder(tmp_path):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_encoder_decoders_by_name(cli, recipe_file, t5_folder, monkeypatch):
    code, _, err = cli("generate", t5_folder, "1+1=", "--max-new-tokens", 2)
    assert code == 0, err
    code, _, err = cli("eval", t5_folder, "--task", "held.jsonl", "--size", 2)
    assert code == 0, err
    code, out, err = cli("doctor", "--model", t5_folder)
    assert code == 0, out + err
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    assert cli("chat", t5_folder)[0] == 0
    code, _, err = cli("generate", t5_folder, "a", "--head", "causal")
    assert code == 4 and "could not be loaded" in err
    code, _, err = cli("doctor", "--model", t5_folder, "--head", "seq2sec")
    assert code == 2 and 'no head "seq2sec". Did you mean "seq2seq"' in err


def test_data_dir_is_taken_by_every_verb_with_data(cli, model_folder):
    recipe = Path("gsm.yaml")
    recipe.write_text(f"model: {model_folder}\ntask: gsm8k\n")
    made = json.loads(cli("train", recipe, "--data-dir", "here", "--dry-run", "--json")[1])
    assert made["task"]["data_dir"] == "here"
    for words in (("inspect", recipe), ("inspect", "gsm8k"), ("sweep", recipe, "-g", "seed=1")):
        code, _, err = cli(*words, "--data-dir", "here")
        assert code == 3 and 'No folder "here"' in err, err


def test_compressed_and_tabbed_files_are_data_everywhere(cli, recipe_file, model_folder):
    text = Path("held.jsonl").read_text()
    with gzip.open("held.jsonl.gz", "wt") as file:
        file.write(text)
    rows = [json.loads(line) for line in text.splitlines()]
    lines = [f"{row['prompt']}\t{row['completion']}" for row in rows]
    Path("held.tsv").write_text("\n".join(["prompt\tcompletion", *lines]))
    for name in ("held.jsonl.gz", "held.tsv"):
        code, _, err = cli("eval", model_folder, "--task", name, "--size", 2)
        assert code == 0, err
        code, out, err = cli("inspect", name, "-m", model_folder, "-n", 1)
        assert code == 0 and "own-train-0" in out, err


def test_inspect_of_a_classification_by_name(cli, labelled, model_folder):
    words = ("--set", "task.text=text", "--set", "task.label=label", "-n", 1)
    code, out, err = cli("inspect", "rows.jsonl", "-m", model_folder, *words)
    assert code == 0 and "class 0" in out, err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.label=label", "is of kind classification, model.head is causal"),
        ("adapter.positions=subject_last", "needs a subject in each row"),
        ("track=tensorboard", "is not installed"),
    ],
)
def test_a_dry_run_finds_what_training_would_stop_at(
    cli, recipe_file, monkeypatch, change, message
):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name)
    )
    code, out, err = cli("train", recipe_file, "--dry-run", "--set", change)
    assert (code, out) == (2, "") and message in err
    assert cli("doctor", "--recipe", recipe_file)[0] == 0


def test_a_dry_run_counts_the_processes(cli, recipe_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = cli("train", recipe_file, "--dry-run")
    assert code == 2 and "batch_size 8 is not a multiple of" in err


def test_evaluations_do_not_replace_each_other(cli, trained):
    def folder(*words):
        made = json.loads(cli("eval", trained, "--json", "--max-new-tokens", 1, *words)[1])
        return made["folder"], made["report"]["seed"]

    asked = [(), ("--size", 2), ("--seed", 3), ("--temperature", 1), ("--against", "base")]
    found = [folder(*words) for words in asked]
    assert len({place for place, _ in found}) == 5
    assert [seed for _, seed in found] == [42, 42, 3, 42, 42]


def test_rows_a_run_was_trained_on_are_not_scored(cli, recipe_file):
    words = ("--set", "task.validation=null", "--set", "max_steps=1")
    assert cli("train", recipe_file, *words)[0] == 0
    code, _, err = cli("eval", "runs/sums", "--split", "validation")
    assert code == 3 and "was trained on all rows; the validation rows" in err
    assert cli("eval", "runs/sums")[0] == 0
    held = (*words, "--set", "evaluate_every=1", "--name", "held")
    assert cli("train", recipe_file, *held)[0] == 0
    assert cli("eval", "runs/held", "--split", "validation")[0] == 0


def test_chat_takes_adapters_of_one_kind(cli, recipe_file, trained, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    lora = ("--set", "adapter.method=lora", "--name", "lora")
    stack = ("--set", f"model.adapter={trained.resolve()}", "--name", "stack")
    for words in (lora, stack):
        assert cli("train", recipe_file, *NONE, *words)[0] == 0
    for name, text in (("lora", "an adapter of kind lora"), ("stack", "a stack of adapters")):
        code, _, err = cli("chat", trained, "--adapter", f"x=runs/{name}")
        assert code == 4 and f'"runs/{name}" is {text}' in err
    Path("empty").mkdir()
    code, _, err = cli("chat", trained, "--adapter", "x=empty")
    assert code == 4 and "is no adapter" in err
    code, _, err = cli("chat", trained, "--adapter", "x=./none")
    assert code == 4 and "There is no adapter folder" in err


def test_a_run_is_asked_in_the_form_it_was_trained_on(cli, recipe_file, monkeypatch):
    form = ("--set", "task.prompt=q {prompt} a", "--set", "task.completion={completion}")
    assert cli("train", recipe_file, *NONE, *form)[0] == 0

    def generated(*words):
        code, out, err = cli("generate", "runs/sums", *words, "--json", "--max-new-tokens", 3)
        assert code == 0, err
        return json.loads(out)["outputs"][0]["prompt"], err

    assert generated("1+1=")[0] == "q 1+1= a" and "the form of task own" in generated("1+1=")[1]
    assert generated("q 1+1= a") == ("q 1+1= a", "")
    assert generated("1+1=", "--template", "{prompt}") == ("1+1=", "")
    assert generated("1+1=", "--chat-template")[0] == [{"role": "user", "content": "1+1="}]

    from reftune.inference import stream

    asked = []

    def noting(model, tokenizer, prompt, **settings):
        asked.append(prompt)
        return stream(model, tokenizer, prompt, **settings)

    monkeypatch.setattr("reftune.inference.stream.stream", noting, raising=False)
    import sys

    monkeypatch.setattr(sys.modules["reftune.inference.stream"], "stream", noting)
    for words, wanted, told in (
        ((), "q 1+1= a", 'Lines are asked as "q ... a", the form of task own'),
        (("--chat-template",), [{"role": "user", "content": "1+1="}], "through the chat template"),
        (("--raw",), "1+1=", ". /help lists commands"),
        (("--template", "{prompt}!"), "1+1=!", ". /help lists commands"),
    ):
        lines = iter(["1+1=", "/quit"])
        monkeypatch.setattr("builtins.input", lambda prompt, lines=lines: next(lines))
        code, _, err = cli("chat", "runs/sums", "--max-new-tokens", 2, *words)
        assert code == 0 and told in err and asked.pop() == wanted
    code, _, err = cli("chat", "runs/sums", "--chat-template", "--raw")
    assert code == 2 and "Choose one" in err


def test_a_form_is_not_put_around_twice():
    assert shape("Q: {prompt}\nA:", "Q: 1?\nA: ") == "Q: 1?\nA: "
    assert shape("{prompt}", "x") == "x" and shape("Q {prompt}", "Qx") == "Q Qx"


def test_beams_on_the_command_line(cli, model_folder):
    words = ("generate", model_folder, "1+1=", "--max-new-tokens", 3, "--json")
    made = json.loads(cli(*words, "--num-beams", 2, "--no-repeat-ngram-size", 1)[1])
    assert made["settings"]["options"]["num_beams"] == 2
    code, _, err = cli(*words, "--num-beams", 2, "--temperature", 1)
    assert code == 2 and "cannot be combined with beams" in err


def test_help_names_the_module_that_runs(cli):
    assert "-m reftune train my.yaml" in " ".join(cli("train", "--help")[1].split())
