"""Evaluation: figures that follow from the predictions, comparison, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from reftune.config.recipe import EvaluationSpec, TaskSpec
from reftune.errors import DataError, ModelError
from reftune.inference import (
    Prediction,
    choose,
    compare,
    evaluate,
    generate,
    load_predictions,
    save_predictions,
    stats,
    wilson,
)
from reftune.tasks import metrics
from reftune.tasks.base import Example, Task

pytestmark = pytest.mark.quick


class Vowels(Task):
    """Right if the answer contains the gold letter; extracts the first letter."""

    name, metric, max_new_tokens = "vowels", "accuracy", 8

    def rows_of(self, split):
        letters = "aeiou"
        return [
            Example(str(i), f"letter {i} is ", letters[i % 5], letters[i % 5]) for i in range(24)
        ]

    def extract(self, text, example):
        return next((c for c in text if c.isalpha()), None)

    def score(self, text, example):
        return {
            "accuracy": float(example.answer in text),
            "share_of_letters": sum(map(str.isalpha, text)) / max(1, len(text)),
        }


class Pairs(Vowels):
    """Two choices; also an aggregate that is no mean."""

    name, kind = "pairs", "choice"

    def rows_of(self, split):
        return [
            Example(str(i), f"is {i} even? ", "yes", "yes" if i % 2 == 0 else "no",
                    choices=("no", "yes"), label=int(i % 2 == 0))
            for i in range(20)
        ]  # fmt: skip

    def aggregate(self, scores, examples, predictions):
        assert len(scores) == len(examples) == len(predictions)
        assert all(isinstance(text, str) for text in predictions)
        return {"sum": sum(s["accuracy"] for s in scores) + len(examples)}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def vowels():
    return Vowels(TaskSpec(name="vowels"))


def test_generation_figures_follow_from_the_answers(model, tokenizer, vowels):
    examples, seen = vowels.load("test"), []
    spec = EvaluationSpec(batch_size=7)
    found = evaluate(
        model, tokenizer, vowels, examples, spec, progress=lambda done, total: seen.append(done)
    )
    answers = generate(model, tokenizer, [e.prompt for e in examples], max_new_tokens=8)
    right = [float(e.answer in a[0]) for e, a in zip(examples, answers, strict=True)]
    assert 0 < sum(right) < len(right)
    figure = found.figures["accuracy"]
    assert figure.mean == pytest.approx(sum(right) / len(right)) and figure.n == 24
    assert (figure.low, figure.high) == wilson(int(sum(right)), 24)
    letters = found.figures["share_of_letters"]
    assert letters.low < letters.mean < letters.high
    assert [p.id for p in found.predictions] == [e.id for e in examples]
    first = found.predictions[0]
    assert first.text == answers[0][0] and first.prompt == "letter 0 is "
    assert first.extracted == vowels.extract(first.text, examples[0]) and first.answer == "a"
    assert found.metric == next(iter(found.figures)) == "accuracy"
    assert found.seconds > 0 and seen[-1] == 24


def test_several_samples_give_mean_pass_at_k_and_majority(model, tokenizer, vowels):
    examples = vowels.load("test")
    spec = EvaluationSpec(temperature=1.0, samples=4)
    found = evaluate(model, tokenizer, vowels, examples, spec, seed=1)
    rows = {e.id: [p for p in found.predictions if p.id == e.id] for e in examples}
    assert all([p.sample for p in row] == [0, 1, 2, 3] for row in rows.values())
    counts = [sum(p.scores["accuracy"] for p in row) for row in rows.values()]
    assert found.figures["accuracy"].mean == pytest.approx(sum(counts) / 96)
    for k in (2, 4):
        expected = sum(stats.pass_at_k(4, int(c), k) for c in counts) / 24
        assert found.figures[f"pass@{k}"].mean == pytest.approx(expected)
    assert found.figures["pass@4"].mean == pytest.approx(sum(c > 0 for c in counts) / 24)
    votes = []
    for row in rows.values():
        given = [p.extracted for p in row if p.extracted]
        best = max(given, key=given.count) if given else None
        votes.append(next((p.scores["accuracy"] for p in row if p.extracted == best), 0.0))
    assert found.figures["majority@4"].mean == pytest.approx(sum(votes) / 24)
    again = evaluate(model, tokenizer, vowels, examples, spec, seed=1)
    assert again.figures == found.figures
    assert found.figures["accuracy"].n == 24  # rows, not samples


@pytest.mark.parametrize("choice_by", ["both", "text", "probability"])
def test_choices_by_probability_and_by_text(model, tokenizer, choice_by):
    task = Pairs(TaskSpec(name="pairs"))
    examples = task.load("test")
    found = evaluate(model, tokenizer, task, examples, choice_by=choice_by)
    logs = choose(model, tokenizer, [e.prompt for e in examples], ["no", "yes"])
    right = [float((yes > no) == e.label) for (no, yes), e in zip(logs, examples, strict=True)]
    if choice_by == "text":
        assert "choice_accuracy" not in found.figures and found.predictions[0].logprobs is None
        return
    assert found.figures["choice_accuracy"].mean == pytest.approx(sum(right) / 20)
    assert found.predictions[3].logprobs == pytest.approx(logs[3])
    auroc = metrics.auroc([yes - no for no, yes in logs], [e.label for e in examples])
    assert found.figures["auroc"].mean == pytest.approx(auroc)
    assert found.figures["auroc"].low <= auroc <= found.figures["auroc"].high
    if choice_by == "probability":
        assert found.figures["accuracy"] == found.figures["choice_accuracy"]
        assert {p.text for p in found.predictions} <= {"no", "yes"}
    figure = found.figures["sum"]
    assert figure.mean == pytest.approx(20 + 20 * found.figures["accuracy"].mean)
    assert figure.low <= figure.mean <= figure.high and figure.unit == "score"


def test_classification_with_an_aggregate(tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()

    class Classes(Vowels):
        name, kind, num_labels = "classes", "classification", 3

        def rows_of(self, split):
            texts = [("cat " * (i % 5 + 1), f"dog {i}") for i in range(12)]
            return [
                Example(str(i), a, "", str(i % 3), label=i % 3, pair=b if i % 2 else None)
                for i, (a, b) in enumerate(texts)
            ]

        def extract(self, text, example):
            return text

        def score(self, text, example):
            return {"accuracy": float(int(text) == example.label)}

        def aggregate(self, scores, examples, predictions):
            assert set(predictions) <= {0, 1, 2}
            return {"never": math.nan, "zeros": sum(p == 0 for p in predictions) / len(predictions)}

    task = Classes(TaskSpec(name="classes"))
    examples = task.load("test")
    found = evaluate(model, tokenizer, task, examples, EvaluationSpec(batch_size=5))
    expected = []
    for example in examples:
        ids = torch.tensor([tokenizer(example.prompt, example.pair)["input_ids"]])
        with torch.no_grad():
            expected.append(int(model(ids).logits[0].argmax()))
    assert [int(p.text) for p in found.predictions] == expected
    right = sum(e.label == p for e, p in zip(examples, expected, strict=True))
    assert found.figures["accuracy"].mean == pytest.approx(right / 12)
    assert found.figures["zeros"].mean == pytest.approx(expected.count(0) / 12)
    assert found.figures["never"].mean is None
    task.num_labels = 2
    with pytest.raises(ModelError, match="head gives 3 numbers a row; the task has 2"):
        evaluate(model, tokenizer, task, examples)
    with pytest.raises(ModelError, match="has no class head"):
        evaluate(tiny_llama(), tokenizer, task, examples)


def test_chat_examples_are_asked_without_their_answer(model, tokenizer, vowels):
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    example = Example("0", "", "", "hello", messages=chat)
    found = evaluate(model, tokenizer, vowels, [example])
    asked = generate(model, tokenizer, [[chat[0]]], max_new_tokens=8)
    assert found.predictions[0].text == asked[0][0]
    assert found.predictions[0].prompt == "user: hi"


def test_nothing_to_evaluate(model, tokenizer, vowels):
    with pytest.raises(DataError, match="no examples to evaluate"):
        evaluate(model, tokenizer, vowels, [])
    double = vowels.load("test")[:1] * 2
    with pytest.raises(DataError, match='2 examples have the id "0"'):
        evaluate(model, tokenizer, vowels, double)
    bare = Example("7", "a", "b", "c", choices=("x", "y"))
    with pytest.raises(DataError, match='Row "7": the answer "c" is none of its choices'):
        evaluate(model, tokenizer, Pairs(TaskSpec(name="pairs")), [bare])


def rows(values, sample=0):
    return [
        Prediction(str(i), "p", "t", None, "g", {"accuracy": v}, sample)
        for i, v in enumerate(values)
    ]


def test_compare_matches_rows_by_id():
    a, b = rows([1.0, 1.0, 0.0, 1.0]), rows([0.0, 1.0, 0.0, 0.0])
    test = compare(a, list(reversed(b)))
    assert (test.only_a, test.only_b, test.n) == (2, 0, 4)
    assert test == stats.mcnemar([1, 1, 0, 1], [0, 1, 0, 0])
    assert compare(b, a).difference == -0.5
    with pytest.raises(DataError, match="4 against 3, of which 1"):
        compare(a, b[:3])
    with pytest.raises(DataError, match=r'no metric "acuracy"\. Did you mean "accuracy"'):
        compare(a, b, metric="acuracy")


def test_compare_takes_the_mean_of_samples():
    a = rows([1.0, 0.0, 1.0]) + rows([0.0, 0.0, 1.0], sample=1)
    test = compare(a, rows([0.0, 0.0, 1.0]))
    assert test.method == "bootstrap" and test.difference == pytest.approx(1 / 6)


def test_predictions_survive_the_disk(tmp_path, model, tokenizer):
    task = Pairs(TaskSpec(name="pairs"))
    found = evaluate(model, tokenizer, task, task.load("test"))
    path = found.save(tmp_path / "deep" / "predictions.jsonl")
    assert load_predictions(path) == found.predictions
    assert json.loads(path.read_text().splitlines()[0])["id"] == "0"
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]
    assert found.compare(found).p_value == 1.0


def test_predictions_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_predictions(tmp_path / "none.jsonl")
    broken = save_predictions(tmp_path / "p.jsonl", rows([1.0]))
    broken.write_text(broken.read_text() + '{"id": "1"}\n')
    with pytest.raises(DataError, match="line 2 is no prediction"):
        load_predictions(broken)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = save_predictions(tmp_path / "p.jsonl", rows([1.0]))
    before = path.read_text()
    bad = Prediction("x", "p", "t", None, "g", {"accuracy": object()})
    with pytest.raises(TypeError, match="cannot write object"):
        save_predictions(path, [*rows([0.0]), bad])
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]
