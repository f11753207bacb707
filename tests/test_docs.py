"""Everything the documentation shows works: code, commands, recipes, links, messages."""

from __future__ import annotations

import importlib.util
import logging
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import pytest
import typer
import yaml
from docs_commands import Desk, printed
from docs_parts import (
    GENERATED,
    PAGES,
    ROOT,
    Block,
    Command,
    anchors,
    blocks,
    commands,
    is_message,
    links,
    messages,
)
from tiny import tiny_llama

from reftune import nano
from reftune.cli.main import app, main
from reftune.config.loader import dump, from_dict, load, loads
from reftune.config.shipped import GRIDS, find, shipped
from reftune.errors import RecipeError, ReftuneError
from reftune.interventions import REGISTRY
from reftune.report.cells import read_grid
from reftune.report.model import Report

quick = pytest.mark.quick
RECIPES = sorted((ROOT / "recipes").rglob("*.y*ml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PYTHON = sorted({block.page for block in blocks("python")})
COMMANDS = list(dict.fromkeys(commands()))
OURS = [command for command in COMMANDS if command.words[0] == "reftune"]
SWITCHES = ("--debug", "--quiet", "-q")


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
    """The shipped model; where no weights are shipped, a random one with the shipped tokenizer."""
    if "nano" in nano.shipped():
        yield
        return
    folder = tmp_path_factory.mktemp("weights") / "nano"
    shutil.copytree(nano.WEIGHTS / "nano", folder)
    config = yaml.safe_load((folder / "tokenizer.json").read_text("utf-8"))
    vocab = len(config["model"]["vocab"]) + 8
    tiny_llama(dim=32, layers=4, vocab=vocab, max_position_embeddings=1024).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "WEIGHTS", folder.parent)
        patch.setattr("reftune.model.names.WEIGHTS", folder.parent)
        yield


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder to run in; what is registered there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    REGISTRY.names()
    monkeypatch.setattr(REGISTRY, "_targets", dict(REGISTRY._targets))
    return tmp_path


# Python


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, in_folder, monkeypatch):
    module = types.ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)
    for block in blocks("python"):
        if block.page == page:
            run_block(block, module)


def run_block(block: Block, module: types.ModuleType) -> None:
    """Run a block with its lines where they stand on the page; parse it if it needs something."""
    source = "\n" * (block.line - 1) + block.text
    code = compile(source, str(block.page), "exec", dont_inherit=True)
    if block.runs:
        exec(code, module.__dict__)


@pytest.mark.parametrize("name", ["trainer", "many_adapters", "own_intervention", "trl_sft"])
def test_examples_run(name, in_folder, monkeypatch):
    if name == "trl_sft":
        pytest.importorskip("trl")
    more = ["--rows", "2"] if name == "own_intervention" else []
    words = [f"{name}.py", "--steps", "1", "--out", "out", *more]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@quick
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_python(file):
    compile(file.read_text("utf-8"), str(file), "exec", dont_inherit=True)


# Commands


@quick
def test_there_are_commands_to_check():
    assert len(OURS) >= 30


@quick
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_understood(command: Command):
    first, *rest = command.words
    if first == "reftune":
        understood(rest)
    elif first == "accelerate":
        module = next(word for word in rest if word in ("reftune", "reftune.cli.main"))
        understood(rest[rest.index(module) + 1 :])
    elif first == "make":
        made(rest)
    elif first == "python":
        python(rest)
    else:
        assert first in ("pip", "echo", "git", "cd", "source", "cat"), first


def understood(arguments: list[str]) -> None:
    """Parse a command line as the command does, without running it."""
    root = typer.main.get_command(app)
    kept = [word for word in arguments if word not in SWITCHES]
    try:
        context = root.make_context("reftune", kept)
    except typer.Exit:  # --version
        return
    words = [*getattr(context, "_protected_args", []), *context.args]
    name, verb, rest = root.resolve_command(context, words)
    assert verb is not None
    values = verb.make_context(name, rest, parent=context).params
    check_values(name, values)


def check_values(name: str, values: dict) -> None:
    """Check recipes, changes, tasks and grids that a command line names."""
    changes = list(values.get("set_") or values.get("overrides") or [])
    changes += [f"task.{option}" for option in values.get("option") or []]
    for text in values.get("grid") or []:
        from reftune.cli.sweep import parse_grid

        changes += [
            f"{key}={value}" for key, kinds in parse_grid([text]).items() for value in kinds
        ]
    if name == "eval" and values["task"]:
        from reftune.cli.common import task_spec

        task_spec(values["task"], None, [c for c in changes if c.startswith("task.")], {})
    if name == "recipes" and values["show"]:
        find(values["show"])
    source = values.get("recipe") or values.get("data")
    if changes and source:
        change_alone(source, changes)


def change_alone(source: str, changes: list[str]) -> None:
    """Apply changes, all of them, to the recipe they are for, or to a recipe on own data."""
    try:
        load(find(source), changes)
    except RecipeError as error:
        if "There is no recipe" not in error.what and "no valid YAML" not in error.what:
            raise
        from_dict({"task": {"name": "own", "train": "mine.jsonl"}}, changes)


def made(words: list[str]) -> None:
    """Check that make has the target."""
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+)%?:", text, re.M))
    for word in words:
        if "=" in word:
            continue
        grid = ROOT / "recipes" / GRIDS / f"{word.removeprefix('results-')}.yaml"
        assert word in targets or (word.startswith("results-") and grid.is_file()), word


def python(words: list[str]) -> None:
    """Check that a module or file is there, and the grid's arguments."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
        return
    assert importlib.util.find_spec(words[1]) is not None, words[1]
    if words[1] == "reftune.report.grid":
        from reftune.report.grid import _arguments

        assert read_grid(ROOT / _arguments(words[2:]).grid).cells


LIGHT = [
    command
    for command in OURS
    if command.words[1:2] in (("methods",), ("recipes",)) or command.words[1:] == ("doctor",)
]


@quick
@pytest.mark.parametrize("command", LIGHT, ids=str)
def test_light_commands_run(command: Command, in_folder, capsys):
    assert main(list(command.words[1:])) == 0
    assert capsys.readouterr().out.strip()


@pytest.fixture
def desk(in_folder):
    root, own = logging.getLogger(), logging.getLogger("reftune")
    before = (list(root.handlers), root.level, own.level)
    yield Desk(in_folder)
    root.handlers[:], root.level, own.level = before


@pytest.mark.slow
def test_commands_run(desk):
    chosen = {command.words: command for command in COMMANDS if command.runs}
    assert len(chosen) >= 55
    failed = {str(command): desk.run(words) for words, command in chosen.items()}
    assert {name: reason for name, reason in failed.items() if reason} == {}


@pytest.fixture
def shipped_desk(desk):
    if "nano" not in nano.shipped():
        pytest.skip("what the guide shows is what the shipped weights do")
    return desk


@pytest.mark.slow
def test_the_guides_own_recipe_learns(shipped_desk):
    """Somebody who follows the guide can tell from the scores that all is well."""
    shipped_desk.says(("reftune", "train", "my.yaml"))
    report = Report.read(Path("runs") / shipped_desk.name)
    base, adapter = (report.figures[f"{owner}_accuracy"] for owner in ("base", "adapter"))
    assert base.n == adapter.n >= 20
    assert base.mean < 0.6 and adapter.mean > 0.9


@pytest.mark.slow
def test_pages_show_what_commands_print(shipped_desk):
    def alike(text):  # the size of rounding differs from machine to machine
        return re.sub(r"both paths agree to \S+", "both paths agree", text)

    assert len(printed()) >= 2
    for words, lines in printed():
        text = alike(shipped_desk.says(words))
        assert [line for line in lines if alike(line) not in text] == []


@quick
def test_few_commands_are_only_read():
    marked = [c.words[0] for c in COMMANDS if not c.runs and not c.place.startswith("docs/results")]
    assert sorted(marked) == ["pip", "pip", "python"]


@quick
def test_a_wrong_command_is_found():
    for line in ("train demo --sett a=1", "trian demo", "train demo --set adapter.rnak=2"):
        with pytest.raises(Exception, match=r"No such|unknown key"):
            understood(line.split())


# Recipes


@quick
def test_recipes_are_found():
    assert len(RECIPES) >= 12
    assert len([path for path in RECIPES if GRIDS in path.parts]) >= 3


@quick
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_parse(path):
    if GRIDS in path.parts:
        assert read_grid(path).cells
    else:
        recipe = load(path)
        assert loads(dump(recipe)) == recipe


@quick
def test_recipes_say_what_was_measured():
    assert [item.name for item in shipped() if not (item.title and item.measured)] == []


@quick
def test_recipes_are_described_by_a_whole_sentence():
    titles = {item.name: item.title for item in shipped()}
    assert {name: title for name, title in titles.items() if not title.endswith(".")} == {}


@quick
@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_yaml_blocks_parse(block, tmp_path):
    if "rows:" in block.text:
        (tmp_path / "grid.yaml").write_text(block.text, encoding="utf-8")
        assert read_grid(tmp_path / "grid.yaml").cells
    else:
        loads(block.text, source=block.place)


# Links, paths, messages


@quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target in GENERATED and not target.exists():
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    pattern = r"(?<![\w/.])(?:recipes|examples|benchmarks|tests|src)/[\w./-]+\.(?:ya?ml|py)\b"
    named = set(re.findall(pattern, page.read_text("utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@quick
def test_one_spelling():
    places = [*PAGES, *RECIPES, *(ROOT / "src" / "reftune" / "cli").glob("*.py")]
    assert [str(place) for place in places if "learnt" in place.read_text("utf-8")] == []


@quick
def test_every_error_has_its_section():
    pages = {cls.page for cls in subclasses(ReftuneError)} | {ReftuneError.page}
    assert pages <= anchors(ROOT / "docs" / "errors.md")


def subclasses(cls: type) -> set[type]:
    found = set(cls.__subclasses__())
    return found.union(*(subclasses(child) for child in found))


@quick
def test_documented_messages_are_those_of_the_code():
    lines = [
        line
        for block in blocks("text")
        if block.page.name == "errors.md" and not block.text.startswith("reftune: ")
        for line in block.text.splitlines()
    ]
    assert len(lines) > 100
    assert [line for line in lines if not is_message(line)] == []
    assert not is_message("There is no such message … at all.")
    assert len(messages()) > 1000


@quick
def test_the_example_of_an_error_is_real():
    from reftune.model.layers import parse_layers

    block = next(b for b in blocks("text") if b.text.startswith("reftune: "))
    with pytest.raises(ReftuneError) as caught:
        parse_layers("12", 8)
    assert block.text.strip() == f"reftune: {caught.value}"


@quick
def test_every_method_has_its_page():
    folder = ROOT / "docs" / "methods"
    own = [name for name in REGISTRY.names() if REGISTRY.target(name).startswith("reftune.")]
    index = (folder / "README.md").read_text("utf-8")
    for name in own:
        assert (folder / f"{name}.md").is_file(), name
        assert f"[`{name}`]({name}.md)" in index


@quick
def test_the_status_of_the_nine_systems_is_true():
    from reftune.methods import catalogue

    index = (ROOT / "docs" / "methods" / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (available|coming) \|$", index, re.M))
    assert rows == {method.name: method.status for method in catalogue() if method.system}


@quick
def test_the_changelog_names_this_version():
    from reftune import __version__

    text = Path(ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## {__version__}" in text
