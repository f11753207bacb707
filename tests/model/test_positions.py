"""The position grammar: parsing, short prompts, groups, and the gathered index."""

from __future__ import annotations

import pytest
import torch

from reftune.errors import PositionError
from reftune.model.adapters import Placement
from reftune.model.positions import PREFIX, SUFFIX, PositionRule, Tokens, row_index

pytestmark = pytest.mark.quick


def places(rule, n, total=None, group="tied", short="union", **columns):
    """Return the edited columns of one unpadded row with a prompt of n tokens."""
    total = n if total is None else total
    tokens = Tokens(
        torch.arange(total)[None],
        torch.ones(1, total, dtype=torch.bool),
        torch.tensor([[n]]),
        **columns,
    )
    mask = PositionRule.parse(rule).select(tokens, group, short)
    return mask[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("f2", [0, 1]),
        ("l2", [4, 5]),
        ("last", [5]),
        ("f1+l2", [0, 4, 5]),
        ("l2+f1", [0, 4, 5]),
        ("f1+last", [0, 5]),
        ("all_prompt", [0, 1, 2, 3, 4, 5]),
        ("generated:2", [6, 7]),
        ("generated:9", [6, 7, 8]),
        ("response", [6, 7, 8]),
        ("all", list(range(9))),
        ("last+generated:1", [5, 6]),
        ("all_prompt+generated:1", [0, 1, 2, 3, 4, 5, 6]),
        ("f1 + l1 + response", [0, 5, 6, 7, 8]),
        ("f9", [0, 1, 2, 3, 4, 5]),
        ("l9", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_terms_of_a_prompt_of_six_and_three_further_tokens(rule, expected):
    assert places(rule, 6, 9) == expected


def test_subject_and_mask():
    assert places("subject_last", 5, subject=torch.tensor([[3]])) == [3]
    assert places("subject_last+last", 5, subject=torch.tensor([[3]])) == [3, 4]
    mask = torch.tensor([[False, True, False, True, False]])
    assert places("mask", 3, 5, mask=mask) == [1, 3]
    assert places("f1+mask", 3, 5, mask=mask) == [0, 1, 3]


PAPER = {1: [0], 5: [0, 1, 2, 3, 4], 13: list(range(13)), 14: list(range(14))}


@pytest.mark.parametrize("n", PAPER)
@pytest.mark.parametrize("short", ["union", "paper"])
def test_short_prompts_with_f7_l7_edit_every_token_once(n, short):
    assert places("f7+l7", n, short=short) == PAPER[n]


@pytest.mark.parametrize(
    ("n", "union", "paper"),
    [
        (1, ([0], []), ([], [0])),
        (5, ([0, 1, 2, 3, 4], []), ([0, 1], [2, 3, 4])),
        (13, ([*range(7)], [*range(7, 13)]), ([*range(6)], [*range(6, 13)])),
        (14, ([*range(7)], [*range(7, 14)]), ([*range(7)], [*range(7, 14)])),
    ],
)
def test_groups_of_an_untied_f7_l7_are_disjoint(n, union, paper):
    for short, (prefix, suffix) in (("union", union), ("paper", paper)):
        assert places("f7+l7", n, group=PREFIX, short=short) == prefix
        assert places("f7+l7", n, group=SUFFIX, short=short) == suffix


def test_paper_clips_each_end_to_half_the_prompt_also_alone():
    assert places("f2+l7", 5, short="paper") == [0, 1, 2, 3, 4]
    assert places("f7+l1", 4, short="paper") == [0, 1, 3]
    assert places("f7", 4, short="paper") == [0, 1]
    assert places("f7", 5, short="paper") == [0, 1]
    assert places("l7", 5, short="paper") == [2, 3, 4]
    assert places("l7", 1, short="paper") == [0] and places("f7", 1, short="paper") == []
    assert places("f2", 4, short="paper") == [0, 1]


def test_error_names_the_row():
    tokens = Tokens(
        torch.arange(8).expand(3, 8), torch.ones(3, 8).bool(), torch.tensor([[8], [3], [8]])
    )
    rule = PositionRule.parse("f2+l2")
    with pytest.raises(PositionError, match=r'"f2\+l2" asks for 4 prompt tokens but row 1 has 3'):
        rule.select(tokens, short="error")
    tokens.prompt_len = torch.tensor([[8], [4], [8]])
    assert rule.select(tokens, short="error").sum() == 12


@pytest.mark.parametrize("text", ["f0", "l0", "generated:0"])
def test_counts_of_nothing_are_refused(text):
    with pytest.raises(PositionError, match="counts no token"):
        PositionRule.parse(text)


@pytest.mark.parametrize("text", ["f", "x3", "", "f2++l2", "f-1", "f2,l2", "generated", "lasst"])
def test_unknown_terms_name_the_known_ones(text):
    with pytest.raises(PositionError, match=r"is not a term.*Known: all, all_prompt"):
        PositionRule.parse(text)
    with pytest.raises(PositionError, match='Did you mean "last"'):
        PositionRule.parse("lasst")


def test_repeated_terms_are_refused():
    with pytest.raises(PositionError, match=r"names the last prompt tokens twice.*: last, l3"):
        PositionRule.parse("last+l3")
    with pytest.raises(PositionError, match=r"names the first prompt tokens twice.*: f4, f5"):
        PositionRule.parse("f4+l1+f5")
    with pytest.raises(PositionError, match="names all_prompt twice"):
        PositionRule.parse("all_prompt+all_prompt")


def test_missing_columns_say_what_to_pass():
    with pytest.raises(PositionError, match="Pass subject_positions="):
        places("subject_last", 4)
    with pytest.raises(PositionError, match="Pass intervention_mask="):
        places("mask", 4)


@pytest.mark.parametrize("text", ["f5+l5", "l3", "all", "f1+response", "f1+l2+generated:8"])
def test_text_form_round_trips(text):
    assert str(PositionRule.parse(text)) == text
    assert PositionRule.parse(str(PositionRule.parse(text))) == PositionRule.parse(text)


def test_untied_needs_a_prefix_and_a_suffix():
    from reftune.errors import AdapterError

    assert Placement(positions="f2+l3", tied=False).groups() == ("prefix", "suffix")
    assert Placement(positions="f2+l3").groups() == ("tied",)
    for positions in ("f2", "l2", "all", "f2+l2+response"):
        with pytest.raises(AdapterError, match="not just a prefix and a suffix"):
            Placement(positions=positions, tied=False).groups()


def test_unknown_short_is_refused():
    with pytest.raises(PositionError, match=r'short is "clip".*Known: error, paper, union'):
        Placement(short="clip").rules()


def test_row_index_is_static_and_distinct():
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, [3, 7]] = True
    mask[1, 19] = True
    index = row_index(mask, 3)
    assert index.shape == (3, 3)
    assert all(len(set(row.tolist())) == 3 for row in index)
    assert index[0, :2].tolist() == [3, 7] and index[1, 0] == 19
    assert row_index(mask, None) is None
    assert row_index(mask, 10) is None, "half of the row or more: all columns are cheaper"
