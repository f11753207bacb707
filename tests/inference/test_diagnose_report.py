"""The whole diagnosis: its door, its files, its words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from diagnose_toys import Echo, pushed, rows, shaken
from tiny import tiny_tokenizer

from reftune.config.recipe import EvaluationSpec, TaskSpec
from reftune.errors import AdapterError, DataError, RecipeError
from reftune.inference import Diagnosis, diagnose_reasoning
from reftune.report import diagnosis as paper
from reftune.report.files import to_json
from reftune.report.model import Figure
from reftune.report.panels import Panel, draw
from reftune.tasks.base import Example

GOLD = " 4+3=7. 7-2=5."


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """What a bootstrap of R² gives is the business of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reftune.inference.probes._RESAMPLES", 20)
        yield


def diagnosed(examples=None, model=None, **more):
    task = Echo(TaskSpec(name="echo"))
    examples = examples or [
        Example(str(i), f"4 and 3 without 2? {i}:", GOLD, "5") for i in range(3)
    ]
    settings = {"tokens": (0, 2), "probe_rows": 24, **more}
    return diagnose_reasoning(
        *(model or shaken(), tiny_tokenizer(), task, examples, EvaluationSpec(batch_size=2)),
        **settings,
    )


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return diagnosed(seed=3)


def test_every_figure_has_an_interval_and_nothing_is_lost_in_json(found):
    assert '"answers"' not in to_json(found.as_dict())
    figures = [point.figure for point in found.prefix.points]
    figures += [*found.prefix.alone.values()]
    figures += [f for probe in found.numbers.probes for f in (*probe.r2.values(),)]
    figures += [f for step in found.errors.steps for f in step.right.values()]
    assert len(figures) > 20 and all(figure.has_interval and figure.n for figure in figures)
    parts = {answer["part"] for answer in found.answers}
    assert parts == {"prefix", "errors"} and found.errors_missing == ""
    assert (found.task, found.rows, found.seed) == ("echo", 3, 3)


def test_the_same_seed_gives_the_same_diagnosis(found):
    again = replace(diagnosed(seed=3), seconds=found.seconds)
    assert again.as_dict() == found.as_dict() and again.answers == found.answers
    assert diagnosed(seed=4).numbers.probes != found.numbers.probes


def test_files_are_whole_and_say_the_same(found, tmp_path):
    page = paper.write(tmp_path, replace(found, more={"adapter": "mine"}))
    assert page == tmp_path / "diagnosis.md"
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        *("diagnosis.json", "diagnosis.md", "answers.jsonl"),
        *("plots/prefix.png", "plots/numbers.png", "plots/errors.png"),
    }
    for name in ("prefix", "numbers", "errors"):
        assert (tmp_path / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"plots/{name}.png" in page.read_text()
    read = json.loads((tmp_path / "diagnosis.json").read_text())
    assert read["adapter"] == "mine" and read["prefix"]["alone"]["base"]["n"] == 3
    assert len(read["numbers"]["probes"]) == 8 and read["errors"]["steps"][1]["step"] == 2
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.answers
    for sentence in paper.sentences(found):
        assert f"- {sentence}" in page.read_text()


def test_a_diagnosis_without_steps_says_why_and_takes_the_old_picture_away(found, tmp_path):
    paper.write(tmp_path, found)
    bare = diagnosed(rows(["2+3=", "a", "b"]))
    assert bare.errors is None and "no worked solutions" in bare.errors_missing
    page = paper.write(tmp_path, bare)
    assert not (tmp_path / "plots/errors.png").exists()
    assert "No figures on error accumulation: These rows bring no worked" in page.read_text()
    assert json.loads((tmp_path / "diagnosis.json").read_text())["errors"] is None
    assert len(paper.tables(bare)) == 2 and len(paper.tables(found)) == 3


def test_a_failure_leaves_what_was_there(found, tmp_path, monkeypatch):
    paper.write(tmp_path, found)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space"):
        paper.write(tmp_path, diagnosed(seed=9))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_words_follow_the_figures():
    task_rows = [Example(str(i), f"{i}+{i}=", "", "") for i in range(12)]
    model = pushed("last", [1], size=30.0)
    gold = diagnosed(task_rows, model)
    said = {a["id"]: a["text"] for a in gold.answers if (a["first"], a["tokens"]) == ("adapter", 0)}
    examples = [replace(e, answer=said[e.id]) for e in task_rows]
    text = " ".join(paper.sentences(diagnosed(examples, model)))
    assert "Alone: base 100.0 %" in text and "adapter 0.0 %" in text
    assert "First tokens of the adapter, and what they change for the base: 2: -100.0" in text
    assert "First tokens of the base, and what they change for the adapter: 2: +100.0" in text
    table = paper.prefix_table(diagnosed(examples, model).prefix).to_markdown()
    assert "| 2 | 0.0 % [0.0, 24.2] | -100.0 [" in table
    same = " ".join(paper.sentences(diagnosed(task_rows, model)))
    assert "what they change for the base: nothing that could not be chance" in same


def test_progress_is_told_part_by_part():
    from contextlib import contextmanager

    titles, last = [], {}

    @contextmanager
    def bar(title):
        titles.append(title)
        yield lambda done, total: last.__setitem__(title, (done, total))

    diagnosed(progress=bar)
    assert titles[:3] == ["states of the base", "states of the adapter", "probes"]
    assert {"answers of the base", "the adapter goes on", "steps of the adapter"} <= set(titles)
    assert all(done == total > 0 for done, total in last.values()) and set(last) == set(titles)


def test_what_makes_no_sense_is_refused_before_the_work():
    from tiny import tiny_llama

    with pytest.raises(AdapterError, match="no adapter"):
        diagnosed(model=tiny_llama())
    with pytest.raises(RecipeError, match='no numbers "sums" to probe'):
        diagnosed(numbers="sums")
    with pytest.raises(RecipeError, match="5 prompts are too few to probe"):
        diagnosed(probe_rows=5)
    with pytest.raises(RecipeError, match="First tokens to hand over: -1"):
        diagnosed(tokens=(-1, 2))
    with pytest.raises(DataError, match='2 rows have the id "0"'):
        diagnosed([*rows(["a"]), *rows(["b"])])
    task = Echo(TaskSpec(name="echo"))
    with pytest.raises(DataError, match="no rows to diagnose"):
        diagnose_reasoning(shaken(), tiny_tokenizer(), task, [])
    task.kind = "classification"
    with pytest.raises(RecipeError, match='"echo" asks for classes'):
        diagnose_reasoning(shaken(), tiny_tokenizer(), task, rows())


def test_the_door_costs_nothing_until_it_is_used():
    code = "import sys, reftune.inference; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_panels_draw_what_there_is(tmp_path):
    figure = Figure(mean=0.5, low=0.4, high=0.6, n=9)
    gaps = {"base": [(0, figure), (1, Figure(mean=None))], "adapter": [], "one": [(1, figure)]}
    panel = Panel("gaps", gaps, {"level": figure, "none": Figure(mean=None)}, names={0: "a"})
    for name in ("a.png", "b.svg"):
        path = draw(tmp_path / name, [panel, replace(panel, bands=False), panel], "three", 2)
        assert path.stat().st_size > 1000
    drawn = (tmp_path / "b.svg").read_text()
    assert "<svg" in drawn and sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.svg"]
