from __future__ import annotations

import pytest
from task_lookalikes import make

from reftune.errors import DataError
from reftune.tasks import metrics
from reftune.tasks.glue import NAME

pytestmark = pytest.mark.quick

FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
}


def rows(name: str, n: int) -> list[dict]:
    texts = FIELDS[name]
    return [
        {**{field: f"{field} {i}" for field in texts}, "label": i % 2, "idx": i} for i in range(n)
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_every_task_reads_its_fields_and_halves_the_validation_rows(hub, name):
    part = "validation_matched" if name == "mnli" else "validation"
    hub.sets[NAME, name, "train"] = rows(name, 6)
    hub.sets[NAME, name, part] = rows(name, 21)
    task = make(name)
    assert task.kind == "classification"
    first = task.load("train")[1]
    assert first.prompt == f"{FIELDS[name][0]} 1"
    assert first.pair == (f"{FIELDS[name][1]} 1" if len(FIELDS[name]) > 1 else None)
    assert (first.target, first.label) == ("", 1)
    assert len(task.load("train")) == 6
    validation, test = task.load("validation"), task.load("test")
    assert (len(validation), len(test)) == (10, 11)
    ids = {e.id for e in validation} | {e.id for e in test}
    assert len(ids) == 21
    assert task.num_labels == {"stsb": 1, "mnli": 3}.get(name, 2)
    other = make(name, seed=7).load("validation")
    assert [e.id for e in other] != [e.id for e in validation]


def test_large_validation_sets_select_on_1000_rows(hub):
    hub.sets[NAME, "qnli", "validation"] = rows("qnli", 5463)
    task = make("qnli")
    assert (len(task.load("validation")), len(task.load("test"))) == (1000, 4463)


def test_local_csv_with_label_names(tmp_path):
    text = "sentence1,sentence2,label\na,b,entailment\nc,d,1\ne,f,not_entailment\n"
    (tmp_path / "rte_train.csv").write_text(text)
    assert [e.label for e in make("rte", tmp_path).load("train")] == [0, 1, 1]


def test_secret_labels_are_refused(hub):
    hub.sets[NAME, "rte", "train"] = [{"sentence1": "a", "sentence2": "b", "label": -1}]
    with pytest.raises(DataError, match=r"label -1 is none of: entailment, not_entailment.*secret"):
        make("rte").load("train")


def test_scores_and_aggregates(hub):
    for name in ("cola", "mrpc", "stsb"):
        hub.sets[NAME, name, "validation"] = rows(name, 8)
    cola, mrpc, stsb = make("cola"), make("mrpc"), make("stsb")
    examples = cola.load("test")
    right = [str(e.label) for e in examples]
    assert all(cola.score(text, e) == {"accuracy": 1.0} for text, e in zip(right, examples))
    assert cola.score("acceptable", examples[0]) == {"accuracy": float(examples[0].label == 1)}
    assert cola.aggregate([], examples, right) == {"matthews": 1.0}
    assert cola.aggregate([], examples, ["1"] * len(examples)) == {"matthews": 0.0}
    examples = mrpc.load("test")
    assert mrpc.aggregate([], examples, [e.answer for e in examples]) == {"f1": 1.0}
    examples = stsb.load("test")
    found = stsb.aggregate([], examples, [str(2 * e.label + 1) for e in examples])
    assert found["pearson"] == pytest.approx(1.0) and found["spearman"] == pytest.approx(1.0)
    assert stsb.score("0.5", examples[0]) == {"absolute_error": 0.5}


def test_metrics_by_hand():
    pred, gold = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 0]
    # tp 2, fp 2, fn 1, tn 3
    assert metrics.matthews(pred, gold) == pytest.approx((2 * 3 - 2 * 1) / (4 * 3 * 5 * 4) ** 0.5)
    assert metrics.f1(pred, gold) == pytest.approx(4 / 7)
    assert metrics.pearson([1, 2, 3, 5], [2, 1, 4, 6]) == pytest.approx(10.25 / 129.0625**0.5)
    assert metrics.pearson([1, 1], [1, 2]) == 0.0
    assert metrics.pearson([float("nan"), 1], [1, 2]) == 0.0
    assert metrics.spearman([1, 2, 2, 9], [1, 3, 3, 4]) == pytest.approx(1.0)
    assert metrics.token_f1("", "a") == 0.0
    assert metrics.token_f1("...", "...") == 1.0
