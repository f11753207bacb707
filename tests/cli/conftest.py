"""Running the command line inside the test process."""

from __future__ import annotations

import json
import logging

import pytest
from tiny import tiny_folder


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Return a function that runs `reftune ARGS` in an empty folder: (code, out, err)."""
    from reftune.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    root, own = logging.getLogger(), logging.getLogger("reftune")
    before = (list(root.handlers), root.level, own.level)

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    yield run
    root.handlers[:], root.level, own.level = before


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


def write_sums(path, first, last):
    rows = [{"prompt": f"{i}+{i}=", "completion": f" {2 * i}"} for i in range(first, last)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(model_folder, tmp_path):
    """A recipe on a tiny model and 16 own rows; two steps."""
    write_sums(tmp_path / "rows.jsonl", 0, 16)
    write_sums(tmp_path / "val.jsonl", 16, 22)
    write_sums(tmp_path / "held.jsonl", 22, 30)
    path = tmp_path / "sums.yaml"
    path.write_text(
        f"""\
model: {model_folder}
task: {{train: rows.jsonl, validation: val.jsonl, test: held.jsonl, max_new_tokens: 3}}
adapter: {{method: loreft, rank: 2, positions: f2+l2}}
max_steps: 2
batch_size: 8
threads: 1
""",
        encoding="utf-8",
    )
    return path
