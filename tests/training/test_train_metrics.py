"""metrics.jsonl and progress."""

from __future__ import annotations

import io
import itertools
import json

import pytest

from reftune.training.callbacks import MetricsWriter, keep_until, read_metrics
from reftune.training.progress import Counting, Progress

TIMES = ("seconds", "tokens_per_second")


def without_times(path):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path)]


def run(trainer_for, model, rows, folder, resume=False, **more):
    writer = MetricsWriter(folder / "metrics.jsonl")
    trainer = trainer_for(
        model,
        rows,
        rows,
        folder=folder / "ck",
        callbacks=[writer, *more.pop("callbacks", ())],
        checkpoint_every=2,
        evaluate_every=2,
    )
    try:
        trainer.train(resume)
    finally:
        writer.close()
    return writer


@pytest.mark.quick
def test_a_line_a_step(adapted, rows, trainer_for, tmp_path):
    writer = run(trainer_for, adapted(), rows, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"stage", "step", "epoch", "loss", "lr", "grad_norm", "tokens", *TIMES}
    assert wanted <= steps[0].keys()
    assert steps[0]["lr"] > steps[-1]["lr"]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(steps))
    assert writer.seconds == pytest.approx(steps[-1]["seconds"], abs=1e-3)
    checks = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in checks] == [2, 4, 6]
    assert not any(key.endswith("runtime") for line in checks for key in line)


def test_a_resumed_file_equals_an_uninterrupted_one(adapted, rows, trainer_for, tmp_path):
    from test_train_trainer import StopAt

    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    run(trainer_for, adapted(), rows, a)
    with pytest.raises(RuntimeError, match="crash"):
        run(trainer_for, adapted(), rows, b, callbacks=[StopAt(5)])
    with (b / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 1, "ste')  # what a kill leaves
    run(trainer_for, adapted(), rows, b, resume=True)
    assert without_times(b / "metrics.jsonl") == without_times(a / "metrics.jsonl")


def test_lines_of_later_steps_are_dropped():
    lines = [{"stage": 1, "step": 8}, {"stage": 2, "step": 2}, {"stage": 2, "step": 3}]
    assert keep_until(lines, 2, 2) == lines[:2]
    assert keep_until(lines, 1, 4) == []


def test_plain_progress_lines(adapted, rows, trainer_for, monkeypatch):
    monkeypatch.setattr(Progress, "QUIET", 0.0)
    stream = io.StringIO()
    trainer_for(adapted(), rows, callbacks=[Progress("loreft", stream)]).train()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("loreft  step 6/6  loss ")
    assert "tokens/s" in lines[-1] and lines[-1].endswith("0:00 left")


def test_a_bar_on_a_terminal(adapted, rows, trainer_for):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress("loreft", stream)
    trainer_for(adapted(), rows, callbacks=[progress]).train()
    progress.close()
    assert "6/6" in stream.getvalue() and "tokens/s" in stream.getvalue()
    with Counting("evaluate", stream) as counting:
        counting(1, 2)
        counting(2, 2)
    assert "evaluate" in stream.getvalue()


def test_nothing_is_printed_to_standard_output(adapted, rows, trainer_for, capsys):
    trainer_for(adapted(), rows, callbacks=[Progress("loreft")]).train()
    assert capsys.readouterr().out == ""


def test_lines_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": 1, "step": 1, "loss": 2.0}\n')
    assert json.loads(path.read_text()) == read_metrics(path)[0]
    assert read_metrics(tmp_path / "none.jsonl") == []
