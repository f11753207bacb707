"""`reftune doctor --model M --recipe R` tells the plan of causal caching."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

KEYS = {
    *("mode", "why", "first_layer", "first_token", "median_tokens", "constant_share"),
    *("constant_blocks", "store_bytes", "store_budget", "speed_up", "dead", "text"),
}
LINES = ("mode", "first layer", "first token", "constant", "store", "speed-up", "dead")


@pytest.fixture
def long_recipe(recipe_file):
    """A recipe whose prompts have 40 tokens, edited at their last two."""
    rows = [
        {"prompt": f"a bird sat on the old wall and said {i:02}=", "completion": f" {i}"}
        for i in range(16)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = recipe_file.read_text()
    text = text.replace("positions: f2+l2", "positions: l2, layers: [1]")
    text = text.replace("max_steps: 2", "epochs: 9")
    recipe_file.write_text(text)
    return recipe_file


def test_doctor_tells_what_causal_caching_does(cli, long_recipe, model_folder):
    code, out, err = cli("doctor", "--model", model_folder, "--recipe", long_recipe, "--json")
    assert code == 0, err
    (plan,) = json.loads(out)["plans"]
    assert set(plan) == KEYS
    assert plan["mode"] == "store" and plan["why"] == "every prefix is used 72 times"
    assert plan["first_layer"] == 1 and plan["constant_blocks"] == 2
    assert plan["first_token"] == 38 and plan["median_tokens"] > 41  # with BOS and the answer
    assert plan["constant_share"] == pytest.approx(38 / plan["median_tokens"], rel=0.1)
    assert plan["speed_up"] > 10 and 0 < plan["store_bytes"] < plan["store_budget"]
    assert "16 of 32 edits of the last block (layer 1)" in plan["dead"]

    code, out, _ = cli("doctor", "--model", model_folder, "--recipe", long_recipe)
    assert code == 0 and "causal caching, stage 1" in out
    shown = [line[2:14].strip() for line in out.split("stage 1")[1].splitlines()[1:] if line]
    assert shown == list(LINES)
    assert "1 of 2, counted from 0; blocks 0 to 1 are constant" in out


def test_doctor_tells_it_also_where_nothing_is_done(cli, long_recipe, model_folder):
    text = long_recipe.read_text()
    for change, reason in (
        ("causal: off", "as the recipe says"),
        ("causal: auto", "the first edit or label stands at token 0"),
        ("adapter.method: lora", "no intervention"),
    ):
        edited = text.replace("positions: l2, layers: [1]", "positions: f1+l1")
        if change.startswith("adapter"):
            edited = edited.replace(
                "{method: loreft, rank: 2, positions: f1+l1}", "{method: lora, rank: 2}"
            )
        else:
            edited += f"{change}\n"
        long_recipe.write_text(edited)
        words = ("doctor", "--model", model_folder, "--recipe", long_recipe)
        plan = json.loads(cli(*words, "--json")[1])["plans"][0]
        assert plan["mode"] == "off" and reason in plan["why"] and plan["speed_up"] == 1
        out = cli(*words)[1]
        assert reason in out
        assert ("first layer" in out) == (not change.startswith("adapter"))


def test_doctor_names_what_rules_a_mode_out(cli, long_recipe, model_folder):
    long_recipe.write_text(
        long_recipe.read_text().replace(
            "{method: loreft, rank: 2, positions: l2, layers: [1]}", "{method: lora, rank: 2}"
        )
        + "causal: store\n"
    )
    code, _, err = cli("doctor", "--model", model_folder, "--recipe", long_recipe)
    assert code == 2 and "causal: lora is no edit of chosen tokens: nothing is constant" in err
