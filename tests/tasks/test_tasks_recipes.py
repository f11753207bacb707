"""Recipes that quote a published figure score as the published code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from reftune.config.loader import load

RECIPES = Path(__file__).parents[2] / "recipes" / "models"
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not RECIPES.is_dir(), reason="the recipes are not beside the tests"),
]


def test_math10k_scores_as_the_paper_it_quotes():
    path = RECIPES / "loreft-math10k-llama-7b.yaml"
    assert "42.6" in path.read_text(encoding="utf-8")
    assert load(path).task.options["compat"] == "reference"


def test_ultrafeedback_decodes_as_the_paper_it_quotes():
    path = RECIPES / "loreft-ultrafeedback-llama-2-7b.yaml"
    assert "85.60" in path.read_text(encoding="utf-8")
    decoding = load(path).evaluation
    assert (decoding.no_repeat_ngram_size, decoding.repetition_penalty) == (5, 1.1)
    assert (decoding.max_new_tokens, decoding.temperature, decoding.num_beams) == (2048, 0.0, 1)
