"""The verbs that load a model, on a tiny one: train, eval, generate, inspect, sweep, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def trained(cli, recipe_file):
    code, _, err = cli("train", recipe_file)
    assert code == 0, err
    return Path("runs/sums")


def test_train_prints_a_table_and_writes_a_run(cli, recipe_file):
    code, out, _ = cli("train", recipe_file)
    assert code == 0
    assert "loreft" in out and "reftune chat runs/sums" in out
    assert Path("runs/sums/report.json").is_file()
    code, _, err = cli("train", recipe_file)
    assert code == 2 and "--overwrite" in err  # nothing is overwritten unasked
    code, out, _ = cli("train", recipe_file, "--overwrite", "--json", "-q")
    assert code == 2  # -q stands before the verb
    code, out, _ = cli("-q", "train", recipe_file, "--overwrite", "--json")
    made = json.loads(out)
    assert code == 0 and made["folder"] == "runs/sums"
    assert made["figures"]["adapter_accuracy"]["n"] == 8
    assert cli("train", recipe_file, "--resume")[0] == 0  # finished already: the report again


def test_missing_data_are_exit_3_before_anything_is_written(cli, recipe_file):
    Path("rows.jsonl").unlink()
    code, _, err = cli("train", recipe_file)
    assert code == 3 and "rows.jsonl" in err
    assert not Path("runs/sums/report.json").exists()


def test_eval_scores_a_run_against_its_base(cli, trained):
    code, out, _ = cli("eval", trained, "--against", "base", "--json", "--output", "scores")
    assert code == 0
    made = json.loads(out)
    assert made["report"]["figures"]["accuracy"]["n"] == 8
    assert made["test"]["n"] == 8 and 0 <= made["test"]["p_value"] <= 1
    assert len(Path("scores/predictions.jsonl").read_text().splitlines()) == 8
    assert len(Path("scores/against/predictions.jsonl").read_text().splitlines()) == 8
    report = json.loads(Path("scores/report.json").read_text())
    assert report["paired_test"]["method"] == "mcnemar"
    code, out, _ = cli("eval", trained, "--against", "base")
    assert "minus base" in out and "p =" in out


def test_eval_of_a_base_model_on_a_file(cli, model_folder, recipe_file):
    words = ("eval", model_folder, "--task", "held.jsonl", "--size", 5, "--json")
    code, out, _ = cli(*words, "--max-new-tokens", 2)
    assert code == 0
    made = json.loads(out)
    assert made["report"]["figures"]["accuracy"]["n"] == 5
    assert Path(made["folder"]).is_dir() and "evaluations" in made["folder"]
    code, _, err = cli(*words, "--against", "base")
    assert code == 3 and "no adapter to switch off" in err


def test_eval_equals_the_training_report(cli, trained):
    figures = json.loads((trained / "report.json").read_text())["figures"]
    made = json.loads(cli("eval", trained, "--json")[1])["report"]["figures"]
    assert made["accuracy"]["mean"] == figures["adapter_accuracy"]["mean"]


def test_generate(cli, trained, monkeypatch):
    code, out, _ = cli(
        "generate", trained, "1+1=", "2+2=", "--base", "--max-new-tokens", 3, "--json"
    )
    rows = json.loads(out)["outputs"]
    assert code == 0 and [row["prompt"] for row in rows] == ["1+1=", "2+2="]
    assert all(len(row["texts"]) == len(row["base"]) == 1 for row in rows)
    code, out, _ = cli("generate", trained, "x", "--template", "{prompt}+1=", "--max-new-tokens", 2)
    assert code == 0 and out
    Path("p.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "a"}\n'
    )
    words = ("generate", trained, "-f", "p.jsonl", "--temperature", 1, "--samples", 2, "--json")
    rows = json.loads(cli(*words, "--max-new-tokens", 2)[1])["outputs"]
    assert [len(row["texts"]) for row in rows] == [2, 2]
    Path("p.jsonl").write_text("{}\n")
    code, _, err = cli("generate", trained, "-f", "p.jsonl")
    assert code == 3 and "p.jsonl line 1 has no prompt" in err
    code, _, err = cli("generate", trained, "a", "--samples", 2)
    assert code == 2 and "greedy" in err


def test_wrong_places_are_exit_4(cli, recipe_file):
    Path("empty").mkdir()
    for what in ("empty", "./nothing", "no-such-model"):
        code, _, err = cli("generate", what, "a")
        assert code == 4, (what, err)


def test_inspect_marks_edited_and_learned_tokens(cli, recipe_file):
    code, out, _ = cli("inspect", recipe_file, "--rows", 2)
    assert code == 0
    assert "[<bos>][0]+[0][=]< ><0><<eos>>" in out
    assert "4.0 edited" in out or "4 edited" in out
    assert "14 train rows" in out or "16 train rows" in out
    assert "none of 8 test questions" in out
    made = json.loads(cli("inspect", recipe_file, "--json", "-n", 1, "-p", "all")[1])
    (row,) = made["stages"][0]["rows"]
    assert all(token["edited"] for token in row["tokens"])
    assert [token["labelled"] for token in row["tokens"]] == [False] * 5 + [True] * 3
    assert made["stages"][0]["summary"]["prompts_cut"] == 0


def test_inspect_takes_a_file_a_task_and_lora(cli, recipe_file, model_folder):
    code, out, _ = cli("inspect", "rows.jsonl", "-m", model_folder, "-p", "last", "-n", 1)
    assert code == 0 and "0+0[=]" in out
    words = ("--set", "adapter.method=lora", "-n", 1)
    out = cli("inspect", recipe_file, *words)[1]
    assert "<bos>0+0=< >" in out and "0.0 edited" in out.replace(" 0 edited", " 0.0 edited")
    code, _, err = cli("inspect", "rows.jsonl", "-m", model_folder, "--split", "tset")
    assert code == 3 and "tset" in err


def test_sweep_selects_on_validation(cli, recipe_file):
    words = ("sweep", recipe_file, "-g", "adapter.rank=1,2", "--set", "max_steps=1", "--json")
    code, out, err = cli(*words)
    assert code == 0, err
    made = json.loads(out)
    assert sorted(cell["values"]["adapter.rank"] for cell in made["cells"]) == [1, 2]
    assert all(cell["figure"]["n"] == 6 for cell in made["cells"])  # validation, not test rows
    assert cli("train", made["best"], "--dry-run")[0] == 0
    assert made["best"] == "runs/sums-sweep/best.yaml"
    shown = cli(*words[:-1])[1]  # all cells are there: nothing is trained again
    assert "Train the best once, to see how it does on test rows:" in shown
    assert "runs/sums-sweep/best.yaml" in shown and "on the test rows" not in shown


def test_report_compares_runs(cli, trained):
    code, out, err = cli("report", trained, "--plot", "a.png", "--curves", "b.png")
    assert code == 0 and "loreft" in out and "wrote a.png" in err
    assert Path("a.png").is_file() and Path("b.png").is_file()
    made = json.loads(cli("report", trained, trained, "--json")[1])
    assert [run["name"] for run in made["runs"]] == ["sums", "sums"]
    assert cli("report", trained, "--markdown")[1].startswith("| run | method |")
    rows = json.loads(cli("report", trained, "--seeds", "--json")[1])["rows"]
    assert {row["method"] for row in rows} == {"loreft", "base"}
    assert "| sums | loreft |" in cli("report", trained, "--seeds", "--markdown")[1]
    assert "no plot file" in cli("report", trained, "--plot", "a.jpg")[2]


def test_doctor(cli, model_folder, recipe_file):
    code, out, _ = cli("doctor", "--json")
    made = json.loads(out)
    assert code == 0 and made["ok"] and made["versions"]["torch"]
    code, out, _ = cli("doctor", "--model", model_folder, "--recipe", recipe_file)
    assert code == 0, out
    assert "ok" in out and "FAILED" not in out and "off" in out
    assert cli("doctor", "--recipe", "none.yaml")[0] == 2


def test_doctor_fails_when_a_check_fails(cli, model_folder, monkeypatch):
    from reftune.model.doctor import Check

    monkeypatch.setattr("reftune.model.doctor.self_check", lambda model: [Check("off", False, "x")])
    code, out, _ = cli("doctor", "--model", model_folder, "--json")
    assert code == 4 and json.loads(out)["ok"] is False


def test_convert_passes_words_on(cli, monkeypatch):
    seen = []

    def fake(*words):
        seen.append(words)
        facts = {"method": "loreft", "rank": 4, "layers": [0, 1], "positions": "f1+l1"}
        return {**facts, "largest_difference": 1e-7}

    monkeypatch.setattr("reftune.model.convert.convert_pyreft", fake)
    code, out, _ = cli("convert", "old", "new", "-m", "nano", "-p", "f1+l1")
    assert code == 0 and "rank 4, 2 layers" in out and "1.0e-07" in out
    assert seen == [("old", "new", "nano", "f1+l1", "none")]


def test_convert_says_which_file_is_damaged(cli, model_folder):
    Path("old").mkdir()
    name = "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"
    words = ("convert", "old", "new", "-m", model_folder, "-p", "l1")
    for content in (b"", b"no checkpoint", b"PK\x03\x04 cut off", b"\x80\x02}q\x00."):
        Path("old", name).write_bytes(content)
        code, _, err = cli(*words)
        assert code == 4 and f"old/{name} " in err and "again with pyreft" in err, err
    Path("old", "config.json").write_text("{")
    code, _, err = cli(*words)
    assert code == 4 and "old/config.json cannot be read: it is damaged" in err
    assert not Path("new").exists()


def test_folders_of_the_adapters_library_are_refused_by_name(cli, trained):
    config = {
        "config": {"architecture": None, "r": 4, "prefix_positions": 3},
        "hidden_size": 32,
        "model_class": "LlamaForCausalLM",
        "model_name": "meta-llama/Llama-3.2-1B",
        "model_type": "llama",
        "name": "task",
    }
    for number, version in enumerate(({}, {"version": "adapters.1.3.0"})):
        folder = Path(f"theirs{number}")
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config | version))
        (folder / "pytorch_adapter.bin").write_bytes(b"")
        for words in (
            ("generate", folder, "a"),
            ("eval", folder, "--task", "held.jsonl"),
            ("chat", trained, "--adapter", f"other={folder}"),
            ("convert", folder, "new", "-m", "nano", "-p", "l1"),
        ):
            code, _, err = cli(*words)
            assert code == 4 and f'{folder} holds the adapter "task" of the adapters libr' in err


def test_set_and_option_mean_the_same_everywhere(cli, recipe_file, model_folder):
    rows = [{"q": f"{i}+{i}=", "a": f" {2 * i}"} for i in range(4)]
    Path("named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--option", "prompt=q", "-o", "completion=a")
    changes = ("--set", "task.prompt=q", "--set", "task.completion=a")
    for words in (
        ("inspect", "named.jsonl", "-m", model_folder, "--json"),
        ("eval", model_folder, "--task", "named.jsonl", "--max-new-tokens", 1, "--json"),
    ):
        made = [json.loads(cli(*words, *more)[1]) for more in (options, changes)]
        if words[0] == "inspect":
            assert made[0] == made[1]
        else:
            assert made[0]["report"]["figures"] == made[1]["report"]["figures"]


def test_eval_changes_what_scoring_reads(cli, trained):
    def scored(*words):
        code, shown, err = cli("eval", trained, "--json", *words)
        assert code == 0, err
        return json.loads(shown)["report"]

    made = scored("--set", "evaluation.top_p=0.5", "--temperature", 0.7, "--set", "seed=7")
    assert made["seed"] == 7 and made["evaluation"]["top_p"] == 0.5
    assert made["evaluation"]["temperature"] == 0.7
    assert scored("--num-beams", 2, "--top-k", 3)["evaluation"]["num_beams"] == 2
    assert scored("--set", "evaluation.split=validation")["split"] == "validation"
    assert scored("--set", "task.test_size=3")["figures"]["accuracy"]["n"] == 3
    code, _, err = cli("eval", trained, "--set", "adapter.rank=3")
    assert code == 2 and '"adapter.rank" is nothing that scoring reads' in err
    code, _, err = cli("eval", trained, "--num-beams", 2, "--temperature", 1)
    assert code == 2 and "2 beams cannot be sampled from" in err
    code, _, err = cli("eval", trained, "--set", "evaluation.topp=1")
    assert code == 2 and "top_p" in err


def test_doctor_checks_a_recipe_against_a_model(cli, recipe_file, model_folder):
    code, shown, _ = cli("doctor", "--recipe", recipe_file)
    assert code == 0 and f"recipe {recipe_file} loreft on" in shown
    text = recipe_file.read_text()
    for change, message in (
        (("rank: 2", "rank: 500"), "rank 500 is larger than the width 32"),
        (("rank: 2", "rank: 2, layers: 0-20"), "Layer 20 in '0-20' does not exist"),
        (("max_steps: 2", "max_steps: 2\nmax_len: 600"), "max_len is 600; the context of"),
    ):
        recipe_file.write_text(text.replace(*change))
        assert cli("doctor", "--recipe", recipe_file)[0] == 0
        code, _, err = cli("doctor", "--model", model_folder, "--recipe", recipe_file)
        assert code in (2, 4) and message in err, err
