"""Word problems whose answers are programs: prompt, target, extraction, limits, rewards."""

from __future__ import annotations

import time

import pytest
from task_lookalikes import gold_accuracy, make, write_rows

from reftune.errors import DataError, RecipeError
from reftune.inference.predictions import scored
from reftune.rewards import programs
from reftune.rewards.programs import Limits
from reftune.tasks.base import Example, ahead
from reftune.training.rollouts import score

HEAD = 'def solution():\n    """tom had {} nuts . how many ?"""\n'
BODY = "    nuts = {}\n    result = nuts\n    return result"
QUESTION = "Question:\ntom had 3 nuts . how many ?\nAnswer reasoning:\n"


def rows(solution=HEAD + BODY, count=30):
    return [
        {
            "item_id": f"svamp_{i}",
            "question": f"tom had {i} nuts . how many ?",
            "answer_cot": solution.replace("{}", str(i)),
            "answer_value": f"{i}.0",
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "math" / "mwp_reft_svamp_python_sdp.jsonl.gz", rows())
    write_rows(tmp_path / "math" / "mwp_reft_svamp_nl.jsonl.gz", rows("He had {}."))
    test = [{k: v for k, v in row.items() if k != "answer_cot"} for row in rows()]
    write_rows(tmp_path / "math" / "mwp_reft_svamp_test_set.jsonl", test)
    return tmp_path


@pytest.mark.quick
def test_the_prompt_goes_on_to_the_docstring_in_training_and_scoring_alike(folder):
    task = make("svamp", folder, template="program")
    train, test = task.load("train")[3], task.load("test")[3]
    assert train.prompt == test.prompt == QUESTION + HEAD.format(3)
    assert (train.target, test.target) == (BODY.format(3), "")
    assert task.prompt_form == QUESTION.replace("tom had 3 nuts . how many ?", "{prompt}") + (
        'def solution():\n    """{prompt}"""\n'
    )
    assert len(task.load("validation")) == 3 and task.max_new_tokens == 400


def test_without_prefill_the_model_writes_the_head_too(folder):
    task = make("svamp", folder, template="program", prefill=False)
    train = task.load("train")
    assert (train[3].prompt, train[3].target) == (QUESTION, (HEAD + BODY).replace("{}", "3"))
    assert gold_accuracy(task, train) == 1.0


def test_right_wrong_hostile_and_no_program(folder):
    task = make("svamp", folder, template="program", program_seconds=1.0, program_memory=128)
    example = task.load("test")[3]
    assert gold_accuracy(task, task.load("train")) == 1.0
    table = {
        BODY.format(3): 1.0,
        BODY.format("3.009"): 1.0,
        HEAD.format(3) + BODY.format(3): 1.0,
        BODY.format(4): 0.1,
        "    return 'three'": 0.0,
        "    return 3 / 0": 0.0,
        "    while True: pass  # return": 0.0,
        "    import os\n    os.kill(os.getppid(), 9)\n    return 3": 0.0,
        "    return len(open('/etc/passwd').read())": 0.0,
        "    return [0] * 10**10": 0.0,
        "Therefore, the answer is: 3": 0.0,
        "3": 0.0,
        "": 0.0,
    }
    for text, value in table.items():
        found = score(task, text, example, 0.1)
        assert (found.value, found.right) == (value, value == 1.0), text
        seen = scored(task, example, text)
        assert seen.scores == {"accuracy": float(value == 1.0)}
        assert (seen.extracted is not None) == (value > 0)


def test_quirks_of_the_published_code_are_an_option(folder):
    text = "    nuts = 3\n\n    return nuts"
    for compat, right in (("default", 1.0), ("reference", 0.0)):
        task = make("svamp", folder, template="program", compat=compat)
        assert task.score(text, task.load("test")[3]) == {"accuracy": right}


def test_letters_are_what_the_program_returns(tmp_path):
    question = "which ?\na ) 38 , b ) 2"
    row = {"item_id": "mathqa_1", "question": question, "answer_value": "b"}
    write_rows(tmp_path / "mwp_reft_mathqa_test_set.jsonl", [row])
    for compat, failed in (("default", 0.0), ("reference", 0.1)):
        task = make("mathqa", tmp_path, template="program", compat=compat)
        example = task.load("test")[0]
        assert question in example.prompt and example.answer == "b", "small letters, as published"
        texts = ("    return 'b'", "    return 'a'", "    return 1 / 0")
        assert [score(task, t, example, 0.1).value for t in texts] == [1.0, 0.1, failed]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gsm8k", "gsm8k_python_sdp"),
        ("gsm_hard", "gsm8k_python_sdp"),
        ("svamp", "svamp_python_sdp"),
        ("mathqa", "mathqa_python_sdp"),
        ("mathqa_numeric", "mathqa-numeric_python_sdp"),
    ],
)
def test_no_other_file_is_trained_on(tmp_path, name, file):
    write_rows(tmp_path / f"{name}_train.jsonl", rows("He had {}."))
    task = make(name, tmp_path, template="program")
    with pytest.raises(DataError, match=f"Looked for: mwp_reft_{file}"):
        task.load("train")
    with pytest.raises(DataError, match=r"another template than program"):
        make(name, template="program").load("train")
    write_rows(tmp_path / f"{file}.jsonl", rows())
    assert task.load("train")[0].target == BODY.format(0)


@pytest.mark.quick
def test_solutions_that_are_no_programs_are_named(tmp_path):
    write_rows(tmp_path / "svamp_python_sdp.jsonl", rows("He had {}."))
    with pytest.raises(DataError, match="line 1: the solution has no program"):
        make("svamp", tmp_path, template="program").load("train")
    write_rows(tmp_path / "svamp_python_sdp.jsonl", rows("import math\n" + HEAD + BODY))
    with pytest.raises(DataError, match=r"something stands before .* set prefill: false"):
        make("svamp", tmp_path, template="program").load("train")
    whole = make("svamp", tmp_path, template="program", prefill=False)
    assert whole.load("train")[0].target.startswith("import math\ndef solution")
    write_rows(tmp_path / "svamp_python_sdp.jsonl", rows("def solution():\n    return {}"))
    bare = make("svamp", tmp_path, template="program").load("train")[3]
    assert (bare.prompt, bare.target) == (QUESTION + HEAD.format(3), "    return 3")


@pytest.mark.quick
@pytest.mark.parametrize("name", ["svamp", "own", "families"])
def test_limits_that_let_nothing_run_are_refused(folder, name):
    with pytest.raises(RecipeError, match=r"-1 seconds and 512 MiB let no program run"):
        make(name, program_seconds=-1)


@pytest.fixture
def runs(monkeypatch):
    """Note which programs are run together, and within which limits."""
    noted, real = [], programs.Programs.run_all

    def run_all(self, sources, compat=False):
        noted.append((len(sources), self.limits))
        return real(self, sources, compat)

    monkeypatch.setattr(programs.Programs, "run_all", run_all)
    return noted


def unique(count):
    """Return bodies that no other test has run."""
    return [f"    return {i}  # {time.monotonic_ns()}" for i in range(count)]


def example_of(i):
    return Example(f"{i}", "", "", str(i))


def test_a_whole_batch_runs_at_once(folder, tmp_path, runs):
    limits = {"program_seconds": 3.0, "program_memory": 256}
    own = write_rows(tmp_path / "held.jsonl", [{"prompt": "?", "completion": "3"}])
    program = make("svamp", folder, template="program", **limits)
    tasks = [
        program,
        make("families", style="program", **limits),
        make("own", test=str(own), reward="program", trigger="So: ", **limits),
    ]
    for task in tasks:
        texts = unique(5)
        given = [f"So: {text}" for text in texts] if task.name == "own" else texts
        found = [
            task.score(text, example)["accuracy"]
            for text, example in ahead(task, given, [example_of(i) for i in range(5)])
        ]
        assert found == [1.0] * 5
    assert runs == [(5, Limits(3.0, 256 * 2**20))] * 3
    scored_elsewhere = make(
        "own", train="x.jsonl", scored={"name": "svamp", "data_dir": str(folder)} | PROGRAM
    )
    rows = scored_elsewhere.load("test")[:4]
    texts = unique(4)
    found = [scored_elsewhere.score(*pair) for pair in ahead(scored_elsewhere, texts, rows)]
    assert found == [{"accuracy": 1.0}] * 4 and runs[3:] == [(4, Limits())]


PROGRAM = {"template": "program"}


def test_evaluation_and_rollouts_look_ahead(folder, runs):
    """Both let the task run what the model wrote before they ask for single answers."""
    from online_toys import adapted, objective_of
    from tiny import tiny_tokenizer

    from reftune.config.recipe import EvaluationSpec
    from reftune.inference.evaluate import evaluate

    task = make("svamp", folder, template="program", train_size=4)
    asked = []
    real = task.look_ahead
    task.look_ahead = lambda texts, examples: asked.append(len(texts)) or real(texts, examples)
    model = adapted()
    spec = EvaluationSpec(max_new_tokens=4, samples=2, temperature=1.0)
    evaluate(model, tiny_tokenizer(), task, task.load("test")[:5], spec)
    assert asked == [10]
    objective = objective_of(max_new_tokens=4, samples=3)
    from reftune.training.encode import encode_all
    from reftune.training.rollouts import Sampler

    examples, tokenizer = task.load("train"), tiny_tokenizer()
    rows = encode_all(examples, tokenizer, 400)
    sampler = Sampler(model, tokenizer, task, rows, examples, objective.config, 400, 1)
    found = sampler([0, 2], 0)
    assert asked == [10, 6] and len(found) == 6
    assert all(r.row.prompt_len == r.gold.prompt_len for r in found)


def test_programs_of_nano_are_run():
    task = make("families", style="program", test_size=8)
    example = task.load("test")[0]
    text = f"def solution():\n    total = {int(example.answer) - 1}\n    return total + 1"
    assert task.score(text, example) == {"accuracy": 1.0, "format_accuracy": 0.0}
    assert task.extract(text, example) == f"{example.answer}.0"
