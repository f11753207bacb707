from __future__ import annotations

import pytest
from task_lookalikes import gold_accuracy, make, write_rows

from reftune.errors import DataError, RecipeError
from reftune.rewards import numeric
from reftune.tasks.problems import Problem, capital_options, from_equation, to_problem

pytestmark = pytest.mark.quick

GSM8K = [
    {
        "question": f"Ann has {i} pens and buys 1,000 more. How many?",
        "answer": f"She has {i}+1000 = <<{i}+1000={i + 1000}>>{i + 1000}.\n#### {i + 1000:,}",
    }
    for i in range(1, 31)
]
REINFORCED = [
    {
        "item_id": f"svamp_{i}",
        "question": f"tom had {i} nuts . how many ?",
        "answer_cot": f"He had {i}.\n\nTherefore, the answer is <{i}>.",
        "answer_value": f"{i}.0",
    }
    for i in range(30)
]
ADAPTERS = {
    "instruction": "How many? ",
    "input": "",
    "output": "\nA: Wrong working. The answer is 5.",
    "answer": "4.0",
}


def math_10k(letter: bool = False) -> list[dict]:
    return [
        {
            "instruction": f"Number {i}?\n ",
            "input": "",
            "output": "So the answer is option C) 5." if letter else f"It is {i}.",
            "answer": "C" if letter else f"{i}.0",
        }
        for i in range(40)
    ]


def test_gsm8k_in_the_form_of_the_representation_paper(tmp_path):
    write_rows(tmp_path / "math" / "gsm8k_train.jsonl.gz", GSM8K)
    write_rows(tmp_path / "math" / "gsm8k_test.jsonl", GSM8K[:5])
    task = make("gsm8k", tmp_path)
    train, validation = task.load("train"), task.load("validation")
    assert (len(train), len(validation), len(task.load("test"))) == (27, 3, 5)
    assert [e.answer for e in validation] == ["1028", "1029", "1030"]
    assert train[0].prompt == (
        "Ann has 1 pens and buys 1,000 more. How many?\nAnswer the above question. First think "
        "step by step and then answer the final number.\n"
    )
    # The published code replaces "####" in "#### 1,001"; the space that follows it stays.
    assert train[0].target == ("She has 1+1000 = <<1+1000=1001>>1001.\nThe final answer is:  1,001")
    assert train[0].answer == "1001"
    assert task.max_new_tokens == 256
    assert gold_accuracy(task, train) == 1.0
    assert task.load("test")[0].target == "The final answer is:  1,001"
    dropped = make("gsm8k", tmp_path, calculator="drop").load("train")[0]
    assert "<<" not in dropped.target


def test_the_last_300_rows_are_the_validation_split(tmp_path):
    rows = [{"question": f"Q{i}", "answer": f"w\n#### {i}"} for i in range(3100)]
    write_rows(tmp_path / "gsm8k_train.jsonl", rows)
    task = make("gsm8k", tmp_path)
    assert [e.answer for e in task.load("validation")] == [str(i) for i in range(2800, 3100)]
    assert len(task.load("train")) == 2800


def test_reinforced_form(tmp_path):
    write_rows(tmp_path / "mwp_reft_svamp_nl.jsonl.gz", REINFORCED)
    test = [{k: v for k, v in row.items() if k != "answer_cot"} for row in REINFORCED]
    write_rows(tmp_path / "mwp_reft_svamp_test_set.jsonl", test)
    task = make("svamp", tmp_path, template="reinforced")
    first = task.load("train")[3]
    assert first.id == "svamp_3"
    assert first.prompt == "Question:\ntom had 3 nuts . how many ?\nAnswer reasoning:\n"
    assert first.prompt.endswith(f"{numeric.MARKER}\n")
    assert first.target == (
        "He had 3.\n\nTherefore, the answer is <3>.\nTherefore, the answer is: 3.0"
    )
    assert task.score("Therefore, the answer is: 3.009", first) == {"accuracy": 1.0}
    assert task.score("Therefore, the answer is: $3", first) == {"accuracy": 0.0}
    assert task.score("3", first) == {"accuracy": 0.0}
    quirk = make("svamp", tmp_path, template="reinforced", compat="reference")
    assert quirk.score("3", first) == {"accuracy": 1.0}
    assert gold_accuracy(task, task.load("test")) == 1.0
    steps = make("svamp", tmp_path).load("train")[3]
    assert steps.target.endswith("<3>.\nThe final answer is:  3")


def test_alpaca_form_trains_on_math_10k_and_hides_test_rationales(tmp_path):
    write_rows(tmp_path / "pyreft_math_1k_train.jsonl", math_10k())
    write_rows(tmp_path / "llm_adapters_addsub_test.jsonl", [ADAPTERS])
    task = make("addsub", tmp_path)
    train, test = task.load("train"), task.load("test")
    assert (len(train), len(task.load("validation"))) == (36, 4)
    assert train[1].prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nNumber 1?\n\n### Response:\n"
    )
    assert train[1].target == "It is 1."
    assert (test[0].target, test[0].answer) == ("The answer is 4.", "4.0")
    assert gold_accuracy(task, test) == 1.0
    as_published = make("addsub", tmp_path, compat="reference").load("train")[1]
    assert "Number 1?\n \n\n### Response" in as_published.prompt


def test_aqua_letters_and_the_reference_quirk(tmp_path):
    row = {**ADAPTERS, "answer": "C", "instruction": "Which? Answer Choices: (A) 1 (C) 5"}
    write_rows(tmp_path / "llm_adapters_aqua_test.jsonl", [row])
    write_rows(tmp_path / "math_10k.json.jsonl", [row])
    text = "Answer: 2 + 3 = 5, which is (C)."
    task = make("aqua", tmp_path)
    example = task.load("test")[0]
    assert task.extract(text, example) == "C"
    assert task.score(text, example) == {"accuracy": 1.0}
    quirk = make("aqua", tmp_path, compat="reference")
    assert quirk.extract(text, example) == "A"
    write_rows(tmp_path / "math_10k.jsonl", math_10k(letter=True))
    assert gold_accuracy(task, task.load("train")) == 1.0


def test_mawps_equations_become_solutions(tmp_path):
    rows = [
        {"id": i, "original_text": f"{i} ?", "segmented_text": "", "equation": eq, "ans": ans}
        for i, (eq, ans) in enumerate(
            [("X=((22.0-14.0)/4.0)", 2.0), ("x=-60.0/0.5", -120.0), ("7=3+x", 4.0)]
        )
    ]
    write_rows(tmp_path / "mawps_trainset.jsonl", rows)
    write_rows(tmp_path / "mawps_validset.jsonl", rows[:1])
    write_rows(tmp_path / "mawps_testset.jsonl", rows[:2])
    task = make("mawps", tmp_path)
    assert [e.target for e in task.load("train")] == [
        "(22 - 14) / 4 = 2.\nThe answer is 2.",
        "-60 / 0.5 = -120.\nThe answer is -120.",
        "7 = 3 + x, so x = 4.\nThe answer is 4.",
    ]
    assert len(task.load("validation")) == 1
    native = make("mawps", tmp_path, template="native").load("train")[0]
    assert native.prompt == "Question: 0 ? Answer:"
    assert native.target == " (22 - 14) / 4 = 2. The answer is 2."


@pytest.mark.parametrize(
    ("equation", "written"),
    [
        ("x=5*-2", "5 * -2 = 1."),
        ("x=(0.5+1)*2.50", "(0.5 + 1) * 2.50 = 1."),
        ("X-6=52", "X - 6 = 52, so x = 1."),
        ("x=4*(3-1)", "4 * (3 - 1) = 1."),
    ],
)
def test_equations_are_written_out(equation, written):
    assert from_equation(equation, "1.0") == written


@pytest.mark.parametrize(
    ("row", "question", "answer", "solution"),
    [
        (
            {"ID": "c", "Body": "It costs 7", "Question": "How much?", "Equation": "( 7 - 2 )",
             "Answer": 5.0, "Type": "x"},
            "It costs 7. How much?", "5.0", "7 - 2, so x = 5.",
        ),
        (
            {"Question": "If number0 of number1 ?", "Numbers": "56.0 9.5", "Equation":
             "* number0 number1", "Answer": "532.0"},
            "If 56 of 9.5 ?", "532.0", "56 * 9.5 = 532.",
        ),
        ({"input": "Big?", "code": "\n", "target": -9867630.0}, "Big?", "-9867630.0", ""),
        (
            {"body": "Two red.", "question": "How many?", "answer": "9 (apples)",
             "formula": "7+2=9", "solution_type": "Addition"},
            "Two red. How many?", "9", "7+2 = 9.",
        ),
        (
            {"question": "Which?", "options": ["A)1", "B)2"], "rationale": "It is two.",
             "correct": "B"},
            "Which? The options are: A)1 B)2", "B", "It is two.\nThe answer is B.",
        ),
        (
            {"Problem": "which ? ", "options": "a ) 38 , b ) 27.675 , c ) none", "Rationale":
             '"so a"', "correct": "a", "category": "x"},
            "which ?\na ) 38 , b ) 27.675 , c ) none", "a", "so a",
        ),
        (
            {"id": "m1", "question": "Sum?", "chain": '<gadget id="c">1 + 1</gadget> <output>2'
             "</output> <result>2</result>", "result": "2", "equation": "x=1+1"},
            "Sum?", "2", "1 + 1 2 2",
        ),
        ({"question": "Sum?", "final_ans": "1,007"}, "Sum?", "1007", ""),
    ],
)  # fmt: skip
def test_every_published_form_is_read(row, question, answer, solution):
    problem = to_problem(row, "x.jsonl")
    assert (problem.question, problem.answer, problem.solution) == (question, answer, solution)


def test_rows_of_unknown_form_and_broken_values_are_named():
    with pytest.raises(DataError, match=r"x.jsonl, line 2: fields \['q'\].*question"):
        to_problem({"q": "?", "__line__": 2}, "x.jsonl")
    broken = {"Question": "number0", "Numbers": None, "Equation": "", "Answer": "1"}
    with pytest.raises(DataError, match="a value is not what fields"):
        to_problem(broken, "x.jsonl")
    with pytest.raises(DataError, match="the answer is empty"):
        to_problem({"question": "Why?", "answer": " "}, "x.jsonl")


def test_training_rows_without_a_solution_still_have_a_target(tmp_path):
    write_rows(tmp_path / "asdiv_train.jsonl", [
        {"body": "Two.", "question": "How many?", "answer": "2 (x)", "formula": ""}
    ])  # fmt: skip
    assert make("asdiv", tmp_path).load("train")[0].target == "The final answer is:  2"


def test_gsm_hard_trains_on_gsm8k_and_writes_no_powers_of_ten(tmp_path):
    write_rows(tmp_path / "gsm8k_train.jsonl", GSM8K)
    write_rows(tmp_path / "pal_gsmhardv2.jsonl", [
        {"input": "Big?", "code": "", "target": 2e-05},
        {"input": "Bigger?", "code": "", "target": 1e22},
    ])  # fmt: skip
    task = make("gsm_hard", tmp_path)
    test = task.load("test")
    assert test[0].target == "The final answer is:  0.00002"
    assert test[1].target.endswith(" 10000000000000000000000")
    assert gold_accuracy(task, test) == 1.0
    assert len(task.load("train")) == 27


def test_mathqa_takes_the_file_that_fits_its_form(tmp_path):
    write_rows(tmp_path / "llm_adapters_mathqa_test.jsonl", [{**ADAPTERS, "answer": "D"}])
    write_rows(tmp_path / "mwp_reft_mathqa_test_set.jsonl", [
        {"item_id": "mathqa_0", "question": "which ?\na ) 1 , b ) 2", "answer_value": "b"}
    ])  # fmt: skip
    assert make("mathqa", tmp_path).load("test")[0].answer == "D"
    task = make("mathqa", tmp_path, template="reinforced")
    example = task.load("test")[0]
    assert example.answer == "b"
    assert task.score('x\nTherefore, the answer is: "B"', example) == {"accuracy": 1.0}


LETTERED = "which ?\na ) 38 , b ) 2 , c ) a dog , d ) data inadequate , e ) none of these"
MATHQA_ROWS = {
    "mwp_reft_mathqa": [
        {"item_id": f"mathqa_{i}", "question": LETTERED, "answer_cot": "it is b .",
         "answer_value": "b"}
        for i in range(20)
    ],
    "mathqa": [
        {"Problem": "which ?", "options": LETTERED.partition("\n")[2], "Rationale": '"so it is b"',
         "correct": "b", "category": "x"}
        for _ in range(20)
    ],
}  # fmt: skip


@pytest.mark.parametrize("compat", ["default", "reference"])
@pytest.mark.parametrize("template", ["alpaca", "steps", "native", "reinforced"])
@pytest.mark.parametrize("form", MATHQA_ROWS)
def test_lower_case_options_of_mathqa_are_answered_in_every_form(tmp_path, form, template, compat):
    rows = MATHQA_ROWS[form]
    endings = ("nl", "test_set") if form.startswith("mwp") else ("train", "test")
    for ending in endings:
        write_rows(tmp_path / f"{form}_{ending}.jsonl", rows)
    task = make("mathqa", tmp_path, template=template, compat=compat)
    train, test = task.load("train"), task.load("test")
    assert gold_accuracy(task, train) == gold_accuracy(task, test) == 1.0
    first = train[0]
    if template == "reinforced":
        assert first.prompt == f"Question:\n{LETTERED}\nAnswer reasoning:\n"
        assert first.target.endswith("\nTherefore, the answer is: b")
        return
    # The only form in which these options are published with capitals is LLM-Adapters'.
    assert (
        "which ? The options: A ) 38 , B ) 2 , C ) a dog , D ) data inadequate , E ) none of these"
        in first.prompt
    )
    assert first.answer == "B"
    assert first.target.endswith(" B" if template == "steps" else "The answer is B.")


def test_options_published_as_a_list_get_capitals_too():
    question = "which ?\n['a ) 1 cm', 'b ) b ) 3 cm']"
    problem = Problem("", question, "", "b")
    assert capital_options(problem).question == "which ? The options: ['A ) 1 cm', 'B ) b ) 3 cm']"
    plain = Problem("", "a and b\nare what ?", "", "4")
    assert capital_options(plain) == plain


def test_the_alpaca_form_of_svamp_prefers_the_text_of_llm_adapters(tmp_path):
    write_rows(tmp_path / "mwp_reft_svamp_test_set.jsonl", REINFORCED)
    write_rows(tmp_path / "llm_adapters_svamp_test.jsonl", [ADAPTERS])
    mix = make("math10k", tmp_path, sets=["svamp"])
    assert [e.question for e in mix.load("test")] == ["How many?"]
    assert len(make("svamp", tmp_path, template="alpaca").load("test")) == 1
    assert len(make("svamp", tmp_path).load("test")) == len(REINFORCED)


def test_math10k_tests_on_several_sets(tmp_path):
    write_rows(tmp_path / "math_10k.json.gz".replace(".json.gz", ".jsonl.gz"), math_10k())
    for name, answer in (("aqua", "C"), ("svamp", "4.0"), ("mawps", "4.0")):
        rows = [{**ADAPTERS, "answer": answer}] * (3 if name == "svamp" else 1)
        write_rows(tmp_path / f"llm_adapters_{name}_test.jsonl", rows)
    task = make("math10k", tmp_path, sets=["aqua", "mawps", "svamp"])
    test = task.load("test")
    assert [e.meta["set"] for e in test] == ["aqua", "mawps", "svamp", "svamp", "svamp"]
    assert len({e.id for e in test}) == 5
    scores = [{"accuracy": float(e.meta["set"] == "svamp")} for e in test]
    figures = task.aggregate(scores, test, [])
    assert figures["macro_accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="no set poetry"):
        make("math10k", tmp_path, sets=["poetry"]).load("test")
    with pytest.raises(DataError, match='No test file of task "gsm8k"'):
        make("math10k", tmp_path).load("test")


def test_train_on_math10k_is_an_option_of_every_set(tmp_path):
    write_rows(tmp_path / "gsm8k_train.jsonl", GSM8K)
    write_rows(tmp_path / "math_10k.jsonl", math_10k())
    task = make("gsm8k", tmp_path, train_on="math10k", template="alpaca", holdout=0)
    assert len(task.load("train")) == 40
    with pytest.raises(DataError, match="has no validation rows"):
        task.load("validation")


def test_missing_files_and_folders_are_named(tmp_path, hub):
    write_rows(tmp_path / "svamp_nl_old.jsonl", REINFORCED)
    with pytest.raises(DataError, match=r"Looked for: mwp_reft_svamp_nl.jsonl.*svamp_nl_old"):
        make("svamp", tmp_path).load("train")
    with pytest.raises(DataError, match="No folder"):
        make("svamp", tmp_path / "nowhere").load("train")
    with pytest.raises(DataError, match=r"not on the hub.*mwp_reft_svamp_nl.jsonl"):
        make("svamp").load("train")
    with pytest.raises(DataError, match=r"openai/gsm8k:main@train.*cannot reach"):
        make("gsm8k").load("train")


def test_hub_rows_are_mapped(hub):
    hub.sets["openai/gsm8k", "main", "test"] = GSM8K[:2]
    hub.sets["ChilleD/SVAMP", None, "train+test"] = [
        {"ID": "chal-1", "Body": "It costs 7", "Question": "How much?", "Equation": "( 7 - 2 )",
         "Answer": "5", "Type": "x"}
    ]  # fmt: skip
    assert make("gsm8k").load("test")[1].answer == "1002"
    assert make("svamp").load("test")[0].question == "It costs 7. How much?"
    assert hub.asked[0] == ("openai/gsm8k", "main", "test", None)


def test_sizes_sample_by_seed(tmp_path):
    write_rows(tmp_path / "gsm8k_train.jsonl", GSM8K)
    write_rows(tmp_path / "gsm8k_test.jsonl", GSM8K)
    task = make("gsm8k", tmp_path, train_size=5, test_size=4, seed=1)
    first, again = task.load("train"), task.load("train")
    assert first == again and len(first) == 5
    assert [e.id for e in first] != sorted(e.id for e in first)
    other = make("gsm8k", tmp_path, train_size=5, seed=2).load("train")
    assert first != other
    places = [int(e.id.rpartition("-")[2]) for e in task.load("test")]
    assert len(places) == 4 and places == sorted(places)


def test_wrong_options_are_all_reported_at_once(tmp_path):
    with pytest.raises(RecipeError, match=r'"templat".*Did you mean "template".*compat: '):
        make("gsm8k", tmp_path, templat="steps", compat="old")
