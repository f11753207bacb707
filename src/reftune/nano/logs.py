"""Sub-world E: logs of four invented machines, job by job, with six kinds of fault.

A job walks the workflow graph of its system (`logs_systems`); each step is one short line. A faulty
job has one fault, and knows its *guilty* lines, so that an explanation can be scored:

- `error`: a line that no normal job has; the job often breaks off there (guilty: that line).
- `skip`: a step is left out (guilty: the line after the gap).
- `swap`: two steps in the wrong order (guilty: both).
- `repeat`: a step that comes once comes three to five times (guilty: the repetitions).
- `value`: a duration far out of range (guilty: that line).
- `stall`: ten minutes and more without a line (guilty: the line after the pause).

Warnings such as a repeated block are normal when the graph has them, so no single word gives a
fault away except in `error`. The base model sees normal lines of `SHOWN` systems only, jobs below
`FIRST_STUDY_JOB`; studies use job numbers from there on. `logs_files` writes raw files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from reftune.nano.item import SEED, Item, Split
from reftune.nano.item import split as split_of
from reftune.nano.logs_systems import SHOWN, SYSTEMS, System

Fault = Literal["error", "skip", "swap", "repeat", "value", "stall"]
FAULTS: tuple[Fault, ...] = ("error", "skip", "swap", "repeat", "value", "stall")
FIRST_STUDY_JOB = 10_000
"""Jobs below belong to the base model's training text, jobs from here on to the studies."""
DAY = 86_400
_LONG_PATH = 16


@dataclass(frozen=True)
class Run:
    """One job.

    Attributes:
        system: Name of the system.
        job: Number of the job.
        lines: Its lines, headers included.
        guilty: Places in `lines` that show the fault; empty for a normal job.
        label: 1 for a faulty job, 0 for a normal one.
        fault: Kind of fault, None for a normal job.
        templates: Name of the template of each line.
        times: Seconds since midnight of the first day, per line.
        texts: The lines without headers.
        place: Number of the machine part that writes the lines.
    """

    system: str
    job: int
    lines: tuple[str, ...]
    guilty: tuple[int, ...]
    label: int
    fault: Fault | None
    templates: tuple[str, ...]
    times: tuple[int, ...]
    texts: tuple[str, ...]
    place: int


def clock(seconds: int) -> str:
    """Return a time of day as six digits.

    >>> clock(3 * 3600 + 7 * 60 + 9)
    '030709'
    """
    seconds %= DAY
    return f"{seconds // 3600:02d}{seconds // 60 % 60:02d}{seconds % 60:02d}"


def header(system: System, seconds: int, place: int, job: int | None) -> str:
    """Return what stands before a line; `job` is None for background lines."""
    if job is None:
        return system.idle_header.format(t=clock(seconds), n=place)
    return system.header.format(t=clock(seconds), n=place, j=job)


def walk(rng: random.Random, system: System) -> list[str]:
    """Return the steps of a normal job: a path through the workflow graph."""
    path: list[str] = []
    node = "start"
    while True:
        choices = system.flow[node]
        if len(choices) == 1 or len(path) >= _LONG_PATH:
            node = choices[-1][0]
        else:
            names, weights = zip(*choices, strict=True)
            node = rng.choices(names, weights)[0]
        if node == "end":
            return path
        path.append(node)


def follows(system: System, before: str, after: str) -> bool:
    """Say whether a normal job can have step `after` right behind step `before`."""
    return any(name == after for name, _ in system.flow.get(before, ()))


def _slots(rng: random.Random) -> dict[str, int]:
    place = rng.randint(1, 8)
    other = rng.randint(1, 7)
    return {
        "n": place,
        "p": other + (other >= place),
        "s": rng.randint(2, 64),
        "m": rng.randint(1, 99),
    }


def _texts(
    rng: random.Random, system: System, path: list[str], slots: dict[str, int]
) -> Iterator[str]:
    """Yield the text of each step."""
    piece = 0
    for name in path:
        piece += name in system.steps
        template = system.templates[name]
        if "{" in template:
            fresh = {"d": rng.randint(2, 60), "q": rng.randint(20, 90), "k": max(piece, 1)}
            template = template.format(**slots, **fresh)
        yield template


def _skip(rng: random.Random, system: System, names: list[str]) -> int:
    """Return a step whose absence shows."""
    places = [
        place
        for place in range(1, len(names) - 1)
        if not follows(system, names[place - 1], names[place + 1])
    ]
    return rng.choice(places)


def _swap(rng: random.Random, system: System, names: list[str]) -> int:
    """Return a step that must not change places with the next one."""
    places = [
        place
        for place in range(1, len(names) - 1)
        if names[place] != names[place + 1] and not follows(system, names[place + 1], names[place])
    ]
    return rng.choice(places)


def _break(
    rng: random.Random, system: System, fault: Fault, rows: list[tuple[str, str]], slots: dict
) -> list[int]:
    """Put a fault into `rows` (template, text) and return the guilty places."""
    names = [name for name, _ in rows]
    if fault == "error":
        place = rng.randint(1, len(rows) - 1)
        name = rng.choice(system.errors)
        pieces = max(sum(step in system.steps for step in names[:place]), 1)
        text = system.templates[name].format(**slots, k=pieces, d=0, q=0)
        rows[place:] = [(name, text), *(rows[place:] if rng.random() < 0.4 else [])]
        return [place]
    if fault == "skip":
        place = _skip(rng, system, names)
        del rows[place]
        return [place]
    if fault == "swap":
        place = _swap(rng, system, names)
        rows[place], rows[place + 1] = rows[place + 1], rows[place]
        return [place, place + 1]
    if fault == "repeat":
        single = [p for p in range(len(rows)) if not follows(system, names[p], names[p])]
        place, count = rng.choice(single), rng.randint(2, 4)
        rows[place + 1 : place + 1] = [rows[place]] * count
        return list(range(place + 1, place + 1 + count))
    if fault == "value":
        timed = [p for p, name in enumerate(names) if "{d}" in system.templates[name]]
        place = rng.choice(timed)
        name = names[place]
        pieces = max(sum(step in system.steps for step in names[: place + 1]), 1)
        long = rng.randint(400, 999)
        rows[place] = (name, system.templates[name].format(**slots, k=pieces, d=long, q=50))
        return [place]
    return [rng.randint(1, len(rows) - 1)]


def run(
    rng: random.Random,
    system: str,
    fault: Fault | None = None,
    job: int | None = None,
    start: int | None = None,
) -> Run:
    """Simulate one job.

    Args:
        rng: Source of all chance.
        system: Name of the system.
        fault: Kind of fault, None for a normal job.
        job: Number of the job; drawn from the study numbers up to 99,999 if None.
        start: Seconds of the first line; drawn from one day if None.
    """
    machine = SYSTEMS[system]
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"A fault is one of {', '.join(FAULTS)}, not {fault!r}.")
    job = rng.randint(FIRST_STUDY_JOB, 99_999) if job is None else job
    seconds = rng.randrange(DAY) if start is None else start
    slots = _slots(rng)
    path = walk(rng, machine)
    rows = list(zip(path, _texts(rng, machine, path, slots), strict=True))
    guilty = _break(rng, machine, fault, rows, slots) if fault else []
    times: list[int] = []
    for place in range(len(rows)):
        if fault == "stall" and place == guilty[0]:
            seconds += rng.randint(600, 3_000)
        elif place:
            seconds += rng.randint(0, 4)
        times.append(seconds)
    lines = tuple(
        header(machine, at, slots["n"], job) + text
        for at, (_, text) in zip(times, rows, strict=True)
    )
    return Run(
        system=system,
        job=job,
        lines=lines,
        guilty=tuple(guilty),
        label=int(fault is not None),
        fault=fault,
        templates=tuple(name for name, _ in rows),
        times=tuple(times),
        texts=tuple(text for _, text in rows),
        place=slots["n"],
    )


def sample(
    rng: random.Random, split: Split = "train", system: str | None = None, lines: int | None = None
) -> Item:
    """Draw two to six consecutive lines of a normal job, as a plain statement.

    The text of a job depends on system and job number alone, so a job has one text.

    Args:
        rng: Source of all chance.
        split: Side of the split the job must lie on.
        system: One of `SHOWN`; default is drawn. Other systems never enter the base's text.
        lines: Number of lines; default is drawn. A shorter job is given whole.

    >>> sample(random.Random(0)).world
    'logs'
    """
    if system is not None and system not in SHOWN:
        raise ValueError(f"The base sees lines of {' and '.join(SHOWN)} only, not of {system!r}.")
    system = system or rng.choice(SHOWN)
    while True:
        job = rng.randint(1, FIRST_STUDY_JOB - 1)
        if split_of("logs", system, str(job)) == split:
            break
    text = run(random.Random(f"{SEED}/logs/{system}/{job}"), system, job=job).lines
    count = min(lines or rng.randint(2, 6), len(text))
    first = rng.randint(0, len(text) - count)
    return Item(
        world="logs",
        kind=system,
        key=(system, str(job)),
        question="",
        answer="\n".join(text[first : first + count]),
        group="normal",
    )
