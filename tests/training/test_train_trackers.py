"""Trackers beside metrics.jsonl, where they are installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reftune.config.recipe import EvaluationSpec
from reftune.training.callbacks import place_events, read_metrics
from reftune.training.stages import train


def events_below(folder):
    return sorted(folder.rglob("events.out.tfevents.*"))


def losses_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in found.Scalars("train/loss")]


@pytest.mark.parametrize("stages", [1, 2])
def test_tensorboard_has_its_folder_in_the_run(recipe, monkeypatch, stages):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra track)")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    tracked = replace(
        recipe,
        stages=recipe.stages * stages,
        track=["tensorboard"],
        evaluation=EvaluationSpec(split="none"),
    )
    train(tracked, progress=False)
    folder = Path(recipe.output) / recipe.name
    lines = read_metrics(folder / "metrics.jsonl")
    places = [folder / "tensorboard"]
    if stages == 2:
        places = [folder / "tensorboard" / f"stage-{number}" for number in (1, 2)]
    for number, place in enumerate(places, 1):
        own = [line for line in lines if line["stage"] == number and "loss" in line]
        wanted = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in own]
        assert losses_of(place) == wanted and len(wanted) == 6
        assert len(events_below(place)) == 1
    assert len(events_below(folder)) == stages


def test_an_own_place_for_events_is_kept(tmp_path):
    from transformers.integrations import TensorBoardCallback

    chosen, other = (object.__new__(TensorBoardCallback) for _ in range(2))
    chosen.logging_dir, other.logging_dir = "mine", None
    place_events([chosen, other, object()], tmp_path)
    assert (chosen.logging_dir, other.logging_dir) == ("mine", str(tmp_path))
