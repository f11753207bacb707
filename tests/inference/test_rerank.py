"""Reranking: the answer a reward model holds most likely right, beside the most frequent one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_folder

from reftune import tasks
from reftune.config.recipe import EvaluationSpec, ModelSpec, TaskSpec
from reftune.errors import DataError, RecipeError
from reftune.inference import stats
from reftune.inference.evaluate import Evaluation
from reftune.inference.figures import figures_of
from reftune.inference.predictions import Prediction, load_predictions, save_predictions
from reftune.inference.rerank import OutcomeModel, best, rerank, reward_task
from reftune.tasks.base import Example

TASK = tasks.get(TaskSpec(name="own", reward="numeric"))
EXAMPLES = [Example(name, f"{name}?", "", "1", name) for name in "abc"]
GIVEN = [  # right is 1; None is no answer at all
    ("a", ("2", "2", "1", None), (0.1, 0.3, 0.4, 0.9)),
    ("b", ("1", "1", "2", "2"), (0.2, 0.2, 0.8, 0.7)),
    ("c", (None, None, None, None), (0.5, 0.6, 0.7, 0.8)),
]


def evaluation():
    """Four samples of three questions, with the figures that evaluation gives."""
    predictions = [
        Prediction(name, f"{name}?", found or "", found, "1", {"accuracy": float(found == "1")}, i)
        for name, answers, _ in GIVEN
        for i, found in enumerate(answers)
    ]

    class Run:
        task, examples, spec, seed = TASK, EXAMPLES, EvaluationSpec(samples=4, temperature=1.0), 0

    return Evaluation(figures_of(Run, predictions, 0.95), predictions, 1.0)


def rater(examples, predictions):
    assert [example.id for example in examples] == [p.id for p in predictions]
    scores = {name: list(values) for name, _, values in GIVEN}
    return [scores[p.id][p.sample] for p in predictions]


@pytest.mark.quick
def test_the_answer_held_most_likely_right_is_scored_beside_the_most_frequent():
    found = rerank(evaluation(), EXAMPLES, rater)
    right = {name: figure.mean * 3 for name, figure in found.figures.items()}
    assert right["rerank@4"] == 1.0  # a: 0.4 is the best with an answer; b: 0.8 is wrong; c: none
    assert right["majority@4"] == 1.0  # a: two of three say 2; b: a tie, and 1 came first
    assert right["pass@4"] == 2.0
    figure = found.figures["rerank@4"]
    assert (figure.low, figure.high) == stats.wilson(1, 3) and figure.n == 3
    assert [p.p_right for p in found.predictions] == [v for _, _, values in GIVEN for v in values]
    same = rerank(evaluation(), EXAMPLES, lambda examples, given: [0.5] * len(given))
    assert same.figures["rerank@4"].mean * 3 == 1.0  # on a tie the first: b alone


@pytest.mark.quick
def test_without_any_valid_answer_none_is_chosen():
    none = [Prediction("c", "?", "", None, "1", p_right=0.9)]
    assert best(none) is None and best([]) is None
    low = Prediction("c", "?", "2", "2", "1", p_right=0.0)
    assert best([*none, low]) == low


@pytest.mark.quick
def test_one_answer_or_other_rows_cannot_be_reranked():
    given = evaluation()
    with pytest.raises(DataError, match="There is one answer a question"):
        one = [p for p in given.predictions if p.sample == 0]
        rerank(replace(given, predictions=one), EXAMPLES, rater)
    with pytest.raises(DataError, match='There is no example "c"'):
        rerank(given, EXAMPLES[:2], rater)


@pytest.mark.quick
def test_opinions_are_saved_and_predictions_without_them_read(tmp_path):
    found = rerank(evaluation(), EXAMPLES, rater)
    path = save_predictions(tmp_path / "p.jsonl", found.predictions)
    assert load_predictions(path) == found.predictions
    path.write_text('{"id": "a", "prompt": "?", "text": "1", "extracted": "1", "answer": "1"}\n')
    assert load_predictions(path)[0].p_right is None


# The reward model


def reward(**options):
    given = {"label": "right", "text": "{prompt}{completion}", "labels": ("False", "True")}
    return tasks.get(TaskSpec(name="own", options={**given, **options}))


def test_p_right_is_the_softmax_at_the_last_token_of_question_and_answer(tmp_path):
    from reftune.model.build import load_base

    torch.manual_seed(3)
    place = str(tiny_folder(tmp_path / "tiny"))
    model, tokenizer = load_base(ModelSpec(place, head="classification"), 2)
    given = [Prediction("a", "a?", text, "1", "1") for text in (" 1", " no, 22", " 1")]
    rate = OutcomeModel(model, tokenizer, reward(), batch_size=2)
    found = rate([EXAMPLES[0]] * 3, given)
    expected = []
    for text in ("a? 1", "a? no, 22", "a? 1"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, -1]
            expected.append(float(model.score(hidden).softmax(-1)[1]))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[0] == pytest.approx(found[2], abs=1e-6) and abs(found[0] - found[1]) > 1e-4
    other = OutcomeModel(model, tokenizer, reward(labels=("True", "False")))
    assert other([EXAMPLES[0]], given[:1]) == pytest.approx([1 - expected[0]], abs=1e-6)


@pytest.mark.quick
def test_a_reward_model_cannot_read_what_is_right():
    rate = OutcomeModel(None, None, reward(text="{prompt}{completion}{gold}"))
    with pytest.raises(DataError, match='asks for a field "gold"'):
        rate(EXAMPLES[:1], [Prediction("a", "a?", " 1", "1", "1")])


@pytest.mark.quick
def test_only_a_classifier_of_right_and_wrong_reranks():
    task, index = reward_task(reward(labels=("wrong", "Right")))
    assert (task.labels[index], index) == ("Right", 1)
    with pytest.raises(RecipeError, match="does not classify answers"):
        reward_task(TASK)
    with pytest.raises(RecipeError, match="does not classify answers"):
        reward_task(tasks.get(TaskSpec(name="sst2")))
    for labels in (("good", "bad"), ("yes", "no", "maybe"), ("right", "true")):
        with pytest.raises(RecipeError, match="which is right"):
            reward_task(reward(labels=labels))
