"""What a run found out: the one shape of `report.json` and of `docs/results.json`.

A `Figure` is one number with its spread and its interval, a `Report` is one run, a `ResultRow` is
one published figure with the command that made it.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reftune.errors import DataError
from reftune.report.files import write_json_atomic


class Figure(BaseModel):
    """One number: `mean`, with spread over seeds and interval over rows where they are known."""

    model_config = ConfigDict(extra="allow")

    mean: float | None
    """The value; the mean over seeds where there are several. None if it could not be computed."""
    sd: float | None = None
    """Standard deviation over seeds."""
    n: int | None = None
    """Rows scored (per seed)."""
    seeds: int = 1
    """Number of seeds behind `mean`."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    unit: str = "share"
    """`share` (0 to 1), `seconds`, `bytes`, `tokens/s`, `ratio`, `nats` ..."""
    error: float | None = None
    """Standard error over rows, of shares that are no mean of right answers (AUROC)."""

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return self.low is not None and self.high is not None


class Report(BaseModel):
    """One run, written to `report.json`. Extra top-level fields are kept.

    >>> report = Report(name="demo", figures={"accuracy": Figure(mean=0.75, n=200)})
    >>> report.figures["accuracy"].mean
    0.75
    """

    model_config = ConfigDict(extra="allow")

    name: str
    """Name of the run, usually the folder's."""
    figures: dict[str, Figure] = Field(default_factory=dict)
    """Named figures: `accuracy`, `base_accuracy` ..."""
    model: str = ""
    """Base model."""
    task: str = ""
    """Task that was trained and scored."""
    methods: list[str] = Field(default_factory=list)
    """Method of each stage."""
    objectives: list[str] = Field(default_factory=list)
    """Objective of each stage."""
    seed: int | None = None
    """Seed of the run."""
    trainable_parameters: int | None = None
    """Trained parameters over all stages; an adapter that several stages trained counts once."""
    trainable_fraction: float | None = None
    """Trained parameters as a share of the base model's."""
    adapter_bytes: int | None = None
    """Size of the saved adapter."""
    train_seconds: float | None = None
    """Wall-clock time of training without evaluation."""
    eval_seconds: float | None = None
    """Wall-clock time of evaluation."""
    steps: int | None = None
    """Optimiser steps over all stages."""
    metric: str = ""
    """Name of the primary figure."""
    command: str = ""
    """The command that repeats the run."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of reftune, torch, transformers, peft, Python."""

    def primary(self) -> tuple[str, Figure] | None:
        """Return the name and value of the figure the run is about, or None if there is none."""
        if self.metric in self.figures:
            return self.metric, self.figures[self.metric]
        for name in ("accuracy", "adapter_accuracy"):
            if name in self.figures:
                return name, self.figures[name]
        return next(iter(self.figures.items()), None)

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all."""
        return write_json_atomic(path, self)

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Report:
        """Read a `report.json`, or the one inside a run folder.

        Raises:
            DataError: If the file is missing or is not a report.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        return read_model(cls, path, "Give a run folder that has finished, or a report.json.")


class ResultRow(BaseModel):
    """One published figure: a row of `docs/results.json`. `mean: null` marks an open cell."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Unique name; its first part is the section: `families/loreft`, `speed/step-512`."""
    method: str = ""
    """Registry key: `loreft`, `lora`, `base` ..."""
    task: str = ""
    """Task scored."""
    model: str = ""
    """Base model."""
    trainable: int | None = None
    """Trained parameters."""
    metric: str = ""
    """What `mean` measures: `accuracy`, `seconds`, `ratio_to_lora` ..."""
    mean: float | None = None
    """The value; None while the cell is open."""
    sd: float | None = None
    """Standard deviation over seeds."""
    seeds: int = 0
    """Seeds behind the mean."""
    n: int | None = None
    """Rows scored per seed."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    unit: str = "share"
    """Unit of mean, sd, low and high."""
    command: str = ""
    """The command that made the figure."""
    seconds: float | None = None
    """Wall-clock time of all cells behind it."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions it was made with."""
    note: str = ""
    """For instance `smoke figure`."""
    line: str = ""
    """The curve it is a point of, in pictures over `x`."""
    x: dict[str, float] = Field(default_factory=dict)
    """Where it stands on the axes of such pictures: `{"epochs": 3, "train_seconds": 41.5}`."""
    setting: str = ""
    """What it was measured with, for benchmarks: batch, device, threads ..."""
    bar: str = ""
    """What it is held against: `<= 0.75`, `at least 0.95`."""
    holds: bool | None = None
    """Whether it is within its bar; None where there is none, or no value."""

    @property
    def section(self) -> str:
        """First part of the name."""
        return self.name.split("/", 1)[0]

    @property
    def is_open(self) -> bool:
        """Whether the cell still waits for its run."""
        return self.mean is None

    def figure(self) -> Figure:
        """Return the number alone."""
        return Figure(
            mean=self.mean,
            sd=self.sd,
            n=self.n,
            seeds=self.seeds,
            low=self.low,
            high=self.high,
            unit=self.unit,
        )


BASELINES = ("base", "majority")
"""What a run is held against and does not train: the base model, and the most frequent label."""


def owner_of(figure: str) -> tuple[str, str]:
    """Return whose figure a report holds, and what of.

    >>> owner_of("base_accuracy"), owner_of("majority_accuracy"), owner_of("adapter_accuracy")
    (('base', 'accuracy'), ('majority', 'accuracy'), ('adapter', 'accuracy'))
    """
    for owner in BASELINES:
        if figure.startswith(f"{owner}_"):
            return owner, figure.removeprefix(f"{owner}_")
    return "adapter", figure.removeprefix("adapter_")


def base_name(name: str, owner: str = "base") -> str:
    """Return the name of a baseline's row beside a row: same place, its name, same suffix.

    >>> base_name("families/loreft@nano-gpt2"), base_name("smoke/svamp/loreft", "majority")
    ('families/base@nano-gpt2', 'smoke/svamp/majority')
    """
    place, _, last = name.rpartition("/")
    suffix = last[last.index("@") :] if "@" in last else ""
    return f"{place}/{owner}{suffix}".lstrip("/")


def read_model(model: type[Any], path: Path, remedy: str) -> Any:
    """Read one pydantic model from a JSON file.

    Raises:
        DataError: If the file is missing, is no JSON, or has another shape.
    """
    try:
        return model.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", remedy) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}).", remedy) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        what = f"{path} is no {model.__name__}: {where}: {first['msg']}."
        raise DataError(what, remedy) from error
