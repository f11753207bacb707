"""Commands of the documentation as somebody would type them: `Desk(folder).run(words)`, made short.

`Desk(folder).says(words)` runs one at full length, for what a page says is `printed()` by it.
Left out on purpose: several processes at once (`accelerate launch` runs its verb in this one).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from docs_parts import PAGES, ROOT, blocks

from reftune.cli.main import main
from reftune.config.recipe import StageSpec
from reftune.config.shipped import find

SHORT = (
    "max_steps=1",
    "batch_size=2",
    "micro_batch_size=2",
    "max_len=192",
    "threads=1",
    "task.train_size=2",
    "task.validation_size=2",
    "task.test_size=2",
    "evaluation.max_new_tokens=2",
)
"""What every recipe is changed to."""
CHANGES = tuple(word for change in SHORT for word in ("--set", change))
ADDED = {
    "demo": CHANGES,
    "train": CHANGES,
    "sweep": CHANGES,
    "inspect": (*CHANGES, "--rows", "1"),
    "eval": ("--size", "2", "--max-new-tokens", "2"),
    "generate": ("--max-new-tokens", "2"),
    "judge": ("--size", "4", "--max-new-tokens", "8"),
    "sample": ("--size", "6", "--samples", "3", "--max-new-tokens", "8"),
    "chat": ("--max-new-tokens", "2"),
}
"""What is added to each verb."""


def _of_stages(recipe: str) -> tuple[str, ...]:
    """Return CHANGES for a recipe, by stage where it has several of its own."""
    written = yaml.safe_load(find(recipe).read_text(encoding="utf-8"))
    count = len(written.get("stages") or ()) if isinstance(written, dict) else 0
    if count < 2 or "heft" in written:
        return CHANGES
    words = []
    for change in SHORT:
        own = change.split("=")[0] in StageSpec.__dataclass_fields__
        words += [f"stages.{i}.{change}" for i in range(count)] if own else [change]
    return tuple(word for change in words for word in ("--set", change))


PRINTED = re.compile(r"<!-- printed by: (reftune .+?) -->\n```text\n(.+?)```", re.S)


def printed() -> list[tuple[tuple[str, ...], list[str]]]:
    """Return the commands whose output pages show, and the lines they show of it."""
    found = [match for page in PAGES for match in PRINTED.findall(page.read_text("utf-8"))]
    return [
        (tuple(shlex.split(command)), [line for line in text.splitlines() if line])
        for command, text in found
    ]


class Desk:
    """A folder with the files the guide speaks of; commands run in it one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = next(b for b in blocks("python") if 'write("mine.jsonl"' in b.text)
        with contextlib.chdir(folder):
            exec(compile(rows.text, rows.place, "exec"), {})
        guide = next(b for b in blocks("yaml") if "\nevaluate_every: 20" in b.text)
        (folder / "my.yaml").write_text(guide.text, encoding="utf-8")
        self.name = yaml.safe_load(guide.text)["name"]
        (folder / "prompts.txt").write_text("1 + 1?\n2 + 2?\n", encoding="utf-8")
        (folder / "prompts.jsonl").write_text('{"prompt": "1 + 1?"}\n', encoding="utf-8")
        (folder / "recipes").symlink_to(ROOT / "recipes")
        speed = {"rows": [{"name": "lora r8", "d": "512", "seconds": 1.0}], "settings": {}}
        (folder / "speed.json").write_text(json.dumps(speed), encoding="utf-8")

    def run(self, words: tuple[str, ...]) -> str | None:
        """Run a command; return what went wrong, or None."""
        first, *rest = words
        if first == "accelerate":
            return self.run(("reftune", *rest[rest.index("reftune") + 1 :]))
        if first == "make":
            return self._make(rest)
        if first == "python":
            return self._python(rest)
        return self._reftune(rest) if first == "reftune" else None

    def says(self, words: tuple[str, ...]) -> str:
        """Run a command of ours as it stands; return all it writes."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(list(words[1:]))
        assert code == 0, said.getvalue()
        return said.getvalue()

    def _make(self, words: list[str]) -> str | None:
        if words == ["demo"]:
            return self._reftune(["demo"])
        done = subprocess.run(
            ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        return done.stderr if done.returncode else None

    def _python(self, words: list[str]) -> str | None:
        """Run a module's `main`; grids open no cell and publish nothing."""
        assert words[0] == "-m", words
        module, *rest = words[1:]
        if module == "reftune.report.grid":
            rest = [("-1" if before == "--max-minutes" else w) for before, w in _pairs(rest)]
            rest += ["--no-publish", "--output", "cells"]
        code = importlib.import_module(module).main(rest)
        return f"exit code {code}" if code else None

    def _reftune(self, words: list[str]) -> str | None:
        self._prepare(words)
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            lines = iter(["1 + 1?", "/base", "/quit"])
            patch.setattr("builtins.input", lambda prompt="": next(lines))
            patch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
            code = main(self.shortened(words))
        return f"exit code {code}: {said.getvalue()}" if code else None

    def shortened(self, words: list[str]) -> list[str]:
        """Return a command with settings that make it short, on the model that is here."""
        verb, *rest = words
        rest = [_first_value(w) if before in ("--grid", "-g") else w for before, w in _pairs(rest)]
        rest = ["nano" if before == "--model" else w for before, w in _pairs(rest)]
        found = []
        for word in rest:
            found += sorted(map(str, Path().glob(word))) if "*" in word else [word]
        asked = {"--resume", "--dry-run", "--overwrite"} & set(found)
        more = ["--overwrite"] if verb == "train" and not asked else []
        added = ADDED.get(verb, ())
        if added is CHANGES and found:
            added = _of_stages(found[0])
        return [verb, *found, *added, *more]

    def _prepare(self, words: list[str]) -> None:
        """Make what earlier pages, or the reader, made: runs by their names, pyreft's folder."""
        for word in words:
            run = re.search(r"runs/[\w-]+", word)
            if run and not Path(run[0]).exists() and "recipe.yaml" not in word:
                mine = Path("runs") / self.name
                if not mine.exists():
                    assert self._reftune(["train", "my.yaml"]) is None
                if not Path(run[0]).exists():
                    shutil.copytree(mine, run[0])
        if words[0] == "convert" and not Path("pyreft_out").exists():
            self._pyreft(Path("pyreft_out"))

    def _pyreft(self, folder: Path) -> None:
        """Write a folder as pyreft does, for the shipped model."""
        from reftune import load_base

        dim = load_base("nano")[0].config.hidden_size
        columns = torch.linalg.qr(torch.randn(dim, 4))[0]
        state = {"weight": torch.randn(4, dim), "bias": torch.zeros(4), "rotate_layer": columns}
        folder.mkdir()
        torch.save(state, folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    """Return each word with the one before it."""
    return list(zip(["", *words], words))


def _first_value(grid: str) -> str:
    return grid.partition(",")[0]
