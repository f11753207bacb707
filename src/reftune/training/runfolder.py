"""The folder of a run: what belongs in it, and who may write there.

    runs/<name>/
      recipe.yaml         the resolved recipe
      environment.json    versions, device, threads
      state.json          what is finished
      metrics.jsonl       a line a step
      checkpoints/        to resume from
      tensorboard/        with track: [tensorboard]
      adapter/ | stack/ | model/
      predictions.jsonl   answers, to read
      report.json, report.md, plots/

A finished run is never written to; an unfinished one only by resuming it with the same recipe. A
run that another replaces stands aside as `.old-<name>` until the new one has done a step: if that
fails to start, it is put back, and if it is killed, by the next that opens the folder.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from reftune.config.recipe import (
    AdapterSpec,
    EvaluationSpec,
    ModelSpec,
    OptimiserSpec,
    Recipe,
    StageSpec,
    TaskSpec,
)
from reftune.errors import RecipeError, TrainingError
from reftune.report.files import plain, write_json_atomic, write_text_atomic
from reftune.report.model import Report
from reftune.training.checkpoints import list_checkpoints
from reftune.training.processes import world_size

log = logging.getLogger(__name__)

LOCK = ".lock"
FREE = ("name", "output", "track")
"""Keys of a recipe that may change between a start and its resumption."""
FREE_UNTIL_FINISHED = ("evaluation",)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


class RunFolder:
    """One run's folder.

    Args:
        recipe: The resolved recipe; the folder is `<output>/<name>`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.path = Path(recipe.output).expanduser() / recipe.name
        self._aside = self.path.with_name(f".old-{self.path.name}")
        self._is_new = False
        self._state: dict[str, Any] = {}
        self._held: IO[str] | None = None

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        resume: bool = False,
        overwrite: bool = False,
        is_main: bool = True,
    ) -> RunFolder:
        """Create or continue the folder of a run.

        A folder left by a run that never got to a checkpoint is used again. Resuming a run that
        never started starts it.

        Args:
            recipe: The resolved recipe.
            resume: Continue an unfinished run.
            overwrite: Delete the run that is there.
            is_main: Whether this process writes.

        Raises:
            RecipeError: If there is a run already, or a folder that is none, or the recipe changed.
            TrainingError: If the folder cannot be written.
        """
        folder = cls(recipe)
        if not is_main:  # the main process refuses for all
            if resume and (folder.path / "state.json").is_file():
                folder._state = folder._read_state()
            return folder
        folder._put_back()
        there = folder._look(overwrite)
        is_run = there in ("finished", "unfinished")
        if is_run and not (resume or overwrite):
            raise folder._refusal(there)
        if there == "foreign":
            raise RecipeError(
                f"{folder.path} exists and is not the folder of a run.",
                "Choose another --name or output:.",
            )
        if there != "none":
            folder._lock()
        try:
            if resume and is_run:
                folder._continue()
                return folder
        except RecipeError:
            folder.release()
            raise
        folder.release()
        folder._create()
        folder._lock()
        return folder

    def _lock(self) -> None:
        """Keep other processes from training here until `release` or the end of this one.

        Raises:
            RecipeError: If another process holds the folder.
        """
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        file = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if owner == f"process {os.getpid()}":
                return  # an earlier run of this process, kept alive by its traceback
            raise RecipeError(
                f"{self.path} is being trained just now by {owner}.",
                "Wait for it, stop it, or choose another --name.",
            ) from None
        except OSError:  # a file system without locks
            file.close()
            return
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        self._held = file

    def release(self) -> None:
        """Let others train here."""
        if self._held is not None:
            self._held.close()
            self._held = None
            (self.path / LOCK).unlink(missing_ok=True)

    def _look(self, overwrite: bool) -> str:
        """Return `none`, `foreign`, `unstarted`, `unfinished` or `finished`."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return "none"
        if not (self.path / "state.json").is_file():
            return "foreign"
        try:
            self._state = self._read_state()
        except TrainingError:
            if overwrite:
                return "unfinished"
            raise
        if self._state.get("status") == "finished":
            return "finished"
        worth = self._state.get("stages") or any(
            list_checkpoints(path) for path in (self.checkpoints, *self.checkpoints.glob("stage-*"))
        )
        return "unfinished" if worth else "unstarted"

    def _refusal(self, there: str) -> RecipeError:
        if there == "finished":
            what = f"{self.path} holds a finished run."
            remedy = "Choose another --name, or delete it with --overwrite."
        else:
            what = f"{self.path} holds an unfinished run."
            remedy = "Continue it with --resume, choose another --name, or use --overwrite."
        return RecipeError(what, f"Nothing there was touched. {remedy}")

    def _continue(self) -> None:
        before = _completed(self._state.get("recipe", {}))
        free = FREE if self.is_finished else (*FREE, *FREE_UNTIL_FINISHED)
        changed = [
            key
            for key in changed_keys(before, plain(asdict(self.recipe)))
            if not key.startswith(tuple(free))
        ]
        if changed:
            raise RecipeError(
                f"{self.path} was started with another recipe; changed: {', '.join(changed)}.",
                "Resume with the recipe in its recipe.yaml, or choose another --name.",
            )

    def _create(self) -> None:
        from reftune.config.loader import dump

        try:
            if self.path.exists():
                os.replace(self.path, self._aside)
            self._is_new = True
            self.path.mkdir(parents=True)
            self._state = {"status": "running", "recipe": plain(asdict(self.recipe)), "stages": []}
            self._write_state()
            write_text_atomic(self.path / "recipe.yaml", dump(self.recipe))
        except OSError as error:
            self.abandon()
            raise TrainingError(
                f"The run folder {self.path} cannot be written: {error}.",
                "Make space, check permissions, or choose another output:.",
            ) from error

    # Replacing a run

    def begin(self) -> None:
        """Delete the run that this one replaces: there is something new to keep."""
        if not self._is_new:
            return
        self._is_new = False
        if self._aside.exists():
            old = self._aside.with_name(f"{self._aside.name}-{uuid.uuid4().hex[:8]}")
            os.replace(self._aside, old)  # what is half deleted must not be put back
            shutil.rmtree(old, ignore_errors=True)

    def abandon(self) -> None:
        """Take a run away that failed before it began, and put back the one it was to replace."""
        if not self._is_new:
            return
        self._is_new = False
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            if self._aside.exists():
                os.replace(self._aside, self.path)
        except OSError as error:
            log.warning("The run that was in %s is in %s (%s)", self.path, self._aside, error)

    def _put_back(self) -> None:
        """Put back a run whose successor was killed before it began."""
        if not self._aside.is_dir():
            return
        if self.path.is_dir():
            self._lock()  # another process may be starting just now
            self.release()
        self._is_new = True
        if self._look(overwrite=True) in ("unfinished", "finished"):
            self.begin()
        else:
            self.abandon()

    # State

    @property
    def is_finished(self) -> bool:
        """Whether the run is done, with its report."""
        return self._state.get("status") == "finished"

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What is known of each finished stage, in order."""
        return list(self._state.get("stages", []))

    def add_stage(self, facts: dict[str, Any]) -> None:
        """Note a finished stage."""
        self._state.setdefault("stages", []).append(plain(facts))
        self._write_state()

    def check_rows(self, index: int, found: str) -> None:
        """Compare the training rows of a stage (from 0) with those the run started with.

        Args:
            index: The stage.
            found: A hash of the rows now.

        Raises:
            RecipeError: If they changed; going on would mix two data sets.
        """
        known = self._state.setdefault("rows", {})
        if known.setdefault(str(index), found) != found:
            raise RecipeError(
                f"The training rows are not those {self.path} was started with: the data, the "
                "tokenizer or the chat template changed.",
                "Put the data back to resume, or choose another --name.",
            )
        self._write_state()

    def finish(self) -> None:
        """Note that the run is done."""
        self.begin()
        self._state["status"] = "finished"
        self._write_state()

    def _read_state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            _check_state(found)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"{self.path / 'state.json'} cannot be read: {error}.",
                "Choose another --name, or delete the run with --overwrite.",
            ) from error
        return found

    def _write_state(self) -> None:
        write_json_atomic(self.path / "state.json", self._state)

    # Places

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The line-a-step file."""
        return self.path / "metrics.jsonl"

    def stage_checkpoints(self, index: int) -> Path:
        """Return the checkpoint folder of a stage (from 0)."""
        single = len(self.recipe.stages) == 1
        return self.checkpoints if single else self.checkpoints / f"stage-{index + 1}"

    def tensorboard(self, index: int) -> Path:
        """Return where a stage (from 0) keeps TensorBoard's events, if it is asked for."""
        single = len(self.recipe.stages) == 1
        return self.path / "tensorboard" / ("" if single else f"stage-{index + 1}")

    def constants(self, index: int) -> Path:
        """Return where a stage (from 0) keeps what causal caching computed, until it is done."""
        return self.path / "constants" / str(index + 1)

    def stage_artefact(self, index: int, kind: str) -> Path:
        """Return where the artefact of a stage (from 0) stands; the last one is the run's."""
        is_last = index == len(self.recipe.stages) - 1
        return self.path / kind if is_last else self.path / "stages" / str(index + 1) / kind

    # Contents

    def write_environment(self) -> dict[str, Any]:
        """Write environment.json: what is needed to repeat the run, no names of people."""
        facts = environment()
        write_json_atomic(self.path / "environment.json", facts)
        return facts

    def write_report(self, report: Report, text: str) -> None:
        """Write report.json and report.md."""
        write_text_atomic(self.path / "report.md", text)
        report.write(self.path / "report.json")


def _check_state(found: Any) -> None:
    """Check that what was read has the form of a run's state.

    Raises:
        ValueError: If it has not.
    """
    if not isinstance(found, dict):
        raise ValueError("it holds no settings")
    for name, kind in (("recipe", dict), ("stages", list), ("rows", dict)):
        if not isinstance(found.get(name, kind()), kind):
            raise ValueError(f'its "{name}" is {json.dumps(found[name])[:40]}')


def _completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe written by an earlier version with the keys that came since, at defaults."""

    def full(values: dict[str, Any], spec: type) -> dict[str, Any]:
        return {**plain(asdict(spec())), **values}

    found = full(recipe, Recipe)
    for name, spec in (("model", ModelSpec), ("task", TaskSpec), ("evaluation", EvaluationSpec)):
        found[name] = full(found[name], spec)
    stages = [full(stage, StageSpec) for stage in found["stages"]]
    for stage in stages:
        stage["adapter"] = full(stage["adapter"], AdapterSpec)
        stage["optimiser"] = full(stage["optimiser"], OptimiserSpec)
    return {**found, "stages": stages}


def changed_keys(before: Any, after: Any, path: str = "") -> list[str]:
    """Return dotted keys at which two plain values differ.

    >>> changed_keys({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "c": [1]})
    ['a.b']
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys: Sequence[Any] = list(dict.fromkeys([*before, *after]))
        pairs = [(key, before.get(key), after.get(key)) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = list(zip(range(len(before)), before, after))
    else:
        return [] if before == after else [path]
    found = []
    for key, old, new in pairs:
        found += changed_keys(old, new, f"{path}.{key}" if path else str(key))
    return found


def environment() -> dict[str, Any]:
    """Return versions, device and threads."""
    import torch

    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    elif torch.backends.mps.is_available():
        device = "mps"
    return {
        "versions": versions(),
        "device": device,
        "bf16": bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported()),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on."""
    from reftune import __version__

    found = {"reftune": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
