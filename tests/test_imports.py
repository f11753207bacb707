"""Imports run one way, light commands stay light, and the core needs no PEFT."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import reftune

quick = pytest.mark.quick
SOURCE = Path(reftune.__file__).parent
LEVELS = [
    {"errors", "registry", "intervals"},
    {"config", "interventions", "rewards"},
    {"nano", "tasks", "model"},
    {"objectives"},
    {"training", "inference"},
    {"editing", "unlearning", "logs"},
    {"cli", "serving", "report", "methods", "peft"},
]
"""A package may import from its own level and from those before it."""
EVERYWHERE = {"errors", "registry", "config"}
LEAVES = {f"report.{name}" for name in ("files", "model", "tables", "drawing", "plots", "saliency")}
"""Modules of `report` that everything which writes a run folder uses; they know only each other."""
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.AST) -> set[str]:
    """Return the modules and names imported anywhere in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(file: Path) -> set[str]:
    """Return the reftune modules a file imports, inside functions too, for typing not."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    return {name for name in imported(tree) if name.startswith("reftune.")}


@lru_cache(maxsize=1)
def edges() -> list[tuple[str, str, str, str]]:
    """Return (importing package, imported package, file, module) of the whole source."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).parts
        own = parts[0].removesuffix(".py")
        if own == "__init__" or own == "__main__":
            continue
        for module in imports(file):
            found.append((own, package_of(module), "/".join(parts), module))
    return found


@quick
def test_every_package_has_a_level():
    packages = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages <= set(LEVEL), f"give {packages - set(LEVEL)} a level"


def is_leaf(module: str) -> bool:
    return any(f"{module}.".startswith(f"reftune.{leaf}.") for leaf in LEAVES)


@quick
def test_imports_run_one_way():
    wrong = []
    for own, other, file, module in edges():
        if other == own or other in EVERYWHERE or is_leaf(module):
            continue
        if LEVEL.get(own, 99) < LEVEL.get(other, 0):
            wrong.append(f"{file} imports {module}")
    assert not wrong, "\n".join(wrong)


@quick
def test_leaves_know_only_each_other():
    for _, other, file, module in edges():
        if is_leaf("reftune." + file.removesuffix(".py").replace("/", ".")):
            assert other in EVERYWHERE or is_leaf(module), f"{file} imports {module}"


@quick
def test_interventions_know_nothing_of_models_and_config_of_nothing():
    for own, other, file, module in edges():
        if own == "interventions":
            assert other in ("interventions", "errors", "registry"), f"{file} imports {module}"
        if own == "rewards":
            assert other in ("rewards", "errors", "registry"), f"{file} imports {module}"


@quick
def test_only_the_seam_knows_peft():
    allowed = {"peft.py"} | {f"model/{n}.py" for n in ("face", "levels", "checkpoint", "build")}
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        modules = imported(ast.parse(file.read_text(encoding="utf-8")))
        if any(module.split(".")[0] == "peft" for module in modules):
            assert name in allowed, f"{name} imports peft"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_core_attaches_trains_and_generates_without_peft():
    run(
        """
import sys, importlib.abc
class NoPeft(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft":
            raise ImportError("peft is not installed")
sys.meta_path.insert(0, NoPeft())
import torch, reftune, reftune.model
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, eos_token_id=2))
ids = torch.arange(3, 11)[None]
reftune.attach(model, reftune.LoreftConfig(rank=2), positions="f1+l1")
labels = ids.clone(); labels[:, :4] = -100
model.train()(input_ids=ids, labels=labels).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
with reftune.off(model):
    model(input_ids=ids)
reftune.detach(model)
assert "peft" not in sys.modules
"""
    )


@quick
def test_import_reftune_is_light():
    run("import sys, reftune; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)")
    assert "attach" in dir(reftune) and callable(reftune.attach)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = reftune.nothing


@quick
def test_every_public_name_exists():
    missing = []
    for name in reftune.__all__:
        try:
            getattr(reftune, name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert not missing, "\n".join(missing)
