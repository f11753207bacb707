"""Shapes in signatures are checked at run time: every one that is written, in every module."""

from __future__ import annotations

import ast
from importlib import import_module

import pytest
import shape_checks
import torch
from jaxtyping import TypeCheckError

from reftune.interventions import get, names
from reftune.interventions.base import Edit, orthonormal_rows
from reftune.model.positions import PositionRule, Tokens
from reftune.model.run import Prepared

pytestmark = pytest.mark.quick
B, T, D = 2, 5, 8


def tokens(**changed):
    given = {
        "place": torch.arange(T).expand(B, T),
        "valid": torch.ones(B, T, dtype=torch.bool),
        "prompt_len": torch.full((B, 1), 3),
    }
    return Tokens(**{**given, **changed})


@pytest.mark.parametrize("name", names())
def test_an_intervention_refuses_what_is_no_row_of_states(name):
    module = get(name)(get(name).Config(), D)
    module.reset()
    assert module(torch.randn(3, D)).delta.shape == (3, D)
    for wrong in (torch.randn(B, T, D), torch.randn(D), torch.ones(3, D, dtype=torch.long)):
        with pytest.raises(TypeCheckError, match="parameter 'h'"):
            module(wrong)


def test_two_arguments_of_one_call_must_agree():
    module = get("loreft")(get("loreft").Config(rank=2), D)
    module.reset()
    h = torch.randn(3, D)
    module(h, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeCheckError, match="parameter 'select'"):
        module(h, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeCheckError, match="parameter 'select'"):
        module(h, torch.ones(3, 2))
    with pytest.raises(TypeCheckError, match="parameter 'gate'"):
        Edit(h, torch.ones(2, 1))


def test_batch_and_sequence_cannot_be_mixed_up():
    rule = PositionRule.parse("f1+l1")
    assert rule.select(tokens()).shape == (B, T)
    packed = torch.full((B, T), 3)
    assert rule.select(tokens(prompt_len=packed)).shape == (B, T)
    with pytest.raises(TypeCheckError, match="parameter 'prompt_len'"):
        tokens(prompt_len=packed.T)
    ids = torch.ones(B, T, dtype=torch.long)
    Prepared(ids, ids, ids)
    Prepared(ids, ids, torch.tensor([0.5, 1.0]))
    for labels in (ids.T, torch.ones(T)):
        with pytest.raises(TypeCheckError, match="parameter 'labels'"):
            Prepared(ids, ids, labels)


def test_answers_are_checked_too(monkeypatch):
    monkeypatch.setattr(torch.linalg, "qr", lambda x: (torch.ones(5, 2), torch.eye(2)))
    with pytest.raises(TypeCheckError, match="return value"):
        orthonormal_rows(torch.randn(2, 3))


def test_half_precision_is_float():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        Edit(torch.zeros(3, D, dtype=dtype))


def says_shape(node):
    return node is not None and "Tensor, '" in ast.unparse(node)


def written(module):
    """Return the full names of the functions and dataclasses of a module that say a shape."""
    file = shape_checks.SOURCE.parent / (module.replace(".", "/") + ".py")
    found = set()

    def visit(node, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                inside = f"{name}.{child.name}"
                fields = [n.annotation for n in child.body if isinstance(n, ast.AnnAssign)]
                if any(map(says_shape, fields)):
                    found.add(f"{inside}.__init__")
                visit(child, inside)
            elif isinstance(child, ast.FunctionDef):
                every = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                if any(map(says_shape, [child.returns, *(a.annotation for a in every)])):
                    found.add(f"{name}.{child.name}")

    visit(ast.parse(file.read_text(encoding="utf-8")), module)
    return found


@pytest.mark.parametrize("module", sorted(shape_checks.annotated()))
def test_every_shape_that_is_written_is_checked(module):
    import_module(module)
    assert written(module) and written(module) <= shape_checks.CHECKED


def test_names_lent_to_a_module_are_taken_back():
    lazy = [name for name, is_lazy in shape_checks.annotated().items() if is_lazy]
    for name in lazy:
        assert not {"Tensor", "Float", "Int"} & set(vars(import_module(name)))
