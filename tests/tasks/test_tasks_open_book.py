"""Questions about passages: cut passages, whole questions, strict scoring, and the baselines."""

from __future__ import annotations

import pytest
from task_lookalikes import make, write_rows
from tiny import tiny_tokenizer

from reftune.config.loader import loads
from reftune.errors import DataError, RecipeError
from reftune.tasks.base import Example
from reftune.tasks.texts import check_kept
from reftune.training.encode import encode

pytestmark = pytest.mark.quick

QUESTION = "is water wet"
ROW = {"question": QUESTION, "passage": "It rains. " * 40 + "Water is wet.", "answer": True}
ASKED = f"question: {QUESTION}?\nanswer:"


@pytest.fixture
def boolq(tmp_path):
    """Return a function that loads a BoolQ task on one row in all splits."""

    def load(**options):
        rows = [options.pop("row", ROW)] * 20
        for split in ("train", "test"):
            write_rows(tmp_path / f"boolq_passage_{split}.jsonl", rows)
        return make("boolq_passage", tmp_path, **options)

    return load


def text_of(ids):
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("max_len", [400, 100, 48])
def test_a_long_passage_is_cut_and_the_question_never(boolq, max_len):
    row = encode(boolq().load("test")[0], tiny_tokenizer(), max_len)
    prompt = text_of(row.input_ids[: row.prompt_len])
    assert len(row.input_ids) == max_len and row.cut > 0
    assert prompt.endswith(ASKED) and "passage:" not in prompt
    assert text_of(row.input_ids[row.prompt_len :]) == " true"
    assert (row.input_ids[0], row.input_ids[-1]) == (1, 2), "BOS and EOS stay"


def test_a_length_that_would_cut_the_question_is_refused(boolq):
    example = boolq().load("train")[0]
    fits = len(ASKED) + 1 + len(" True") + 1  # BOS and EOS
    assert text_of(encode(example, tiny_tokenizer(), fits).input_ids[1:-6]) == ASKED
    with pytest.raises(DataError, match=r'would cut into "Question: is water wet\?') as caught:
        encode(example, tiny_tokenizer(), fits - 1)
    assert "Set a larger max_len" in str(caught.value)


def test_rows_that_keep_nothing_are_cut_as_before():
    long = Example("r", "abc" * 30, " d", "d")
    assert encode(long, tiny_tokenizer(), 20).cut == 90 - 20 + 4
    check_kept(long, tiny_tokenizer(), long.prompt, 80)


def test_words_are_cut_in_training_and_scoring_alike(boolq):
    task = boolq(passage_words=3)
    prompts = {task.load(split)[0].prompt for split in ("train", "test")}
    assert prompts == {"Passage: Water is wet.\nQuestion: is water wet?\nAnswer:"}
    with pytest.raises(RecipeError, match="passage_words is 0"):
        loads("task: {name: boolq_passage, passage_words: 0}")


@pytest.mark.parametrize("asked", ["is water wet", "is water wet?", " is water wet ? "])
def test_a_question_has_one_mark(boolq, asked):
    task = boolq(row={**ROW, "question": asked, "passage": "It is."})
    assert task.load("test")[0].prompt == f"Passage: It is.\nQuestion: {QUESTION}?\nAnswer:"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" True", 1.0),
        (" true.", 1.0),
        ("Yes, it is.", 1.0),
        (" TRUE\nQuestion: is it true", 1.0),
        (" False", 0.0),
        ("no", 0.0),
        ("untrue", 0.0),
        ("true or false", 0.0),
        ("Yes or no? Yes", 0.0),
        ("It is true", 0.0),
        ("Truely", 0.0),
        ("", 0.0),
        ("?", 0.0),
    ],
)
def test_greedy_text_is_right_only_if_it_says_so_at_once(boolq, text, right):
    task = boolq()
    example = task.load("test")[0]
    assert task.score(text, example) == {"accuracy": right}
    wrong = boolq(row={**ROW, "answer": False}).load("test")[0]
    flipped = right == 0.0 and text in (" False", "no")
    assert task.score(text, wrong) == {"accuracy": float(flipped)}, "unparsed is wrong either way"


def test_the_question_alone(boolq, tmp_path):
    task = boolq(passage=False)
    with_passage = boolq()
    for alone, whole in zip(task.load("test"), with_passage.load("test")):
        assert alone.prompt == "Question: is water wet?\nAnswer:"
        assert whole.prompt.endswith(alone.prompt)
        assert (alone.id, alone.target, alone.label) == (whole.id, whole.target, whole.label)


def test_the_question_alone_is_found_in_rows_without_passages(tmp_path):
    rows = [
        {
            "instruction": "Please answer the following question with true or false, question: is "
            "water wet?\n\nAnswer format: true/false",
            "answer": answer,
        }
        for answer in ("true", "false")
    ]
    write_rows(tmp_path / "boolq_test.jsonl", rows)
    first, second = make("boolq_passage", tmp_path, passage=False).load("test")
    assert first.prompt == second.prompt == "Question: is water wet?\nAnswer:"
    assert (first.target, second.target) == (" True", " False")
    with pytest.raises(DataError, match="Looked for: boolq_passage_test"):
        make("boolq_passage", tmp_path).load("test")


def test_nanos_questions_alone_are_those_of_the_passages():
    whole = make("passages", train_size=30, test_size=30)
    alone = make("passages", train_size=30, test_size=30, passage=False)
    for split in ("train", "test"):
        for one, other in zip(whole.load(split), alone.load(split), strict=True):
            question = one.meta["question"]
            assert other.prompt == f"Question: {question} Answer:"
            assert one.prompt.endswith(f" {question} Answer:") and len(one.prompt) > len(
                other.prompt
            )
            assert (one.id, one.target, one.choices) == (other.id, other.target, other.choices)


def test_nanos_questions_are_not_cut_either():
    example = make("passages", train_size=5, test_size=5).load("test")[0]
    tokenizer = tiny_tokenizer()
    question = len(f"{example.meta['question']} Answer:") + 1 + len(example.target) + 1
    assert encode(example, tokenizer, question + 3).cut > 0
    with pytest.raises(DataError, match="would cut into"):
        encode(example, tokenizer, question - 1)
