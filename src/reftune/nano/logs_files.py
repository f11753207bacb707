"""Writes raw log files of sub-world E: many jobs at once, with the dirt of real machines.

Lines of jobs that run at the same time are interleaved, now and then many jobs start at once (a
burst), background lines belong to no job, the clock jumps forwards or back (the order of the file
is the true order), and some lines hold bytes that are not UTF-8. Files are written line by line, so
their size is bounded by the disk only.
"""

from __future__ import annotations

import csv
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reftune.nano.logs import FAULTS, FIRST_STUDY_JOB, Fault, Run, header, run
from reftune.nano.logs_systems import SYSTEMS

_BAD_BYTES = (0xFF, 0xFE, 0xC3, 0x80)


@dataclass(frozen=True)
class Dirt:
    """How unclean a file is; every rate is a chance per line, `burst` per job.

    Attributes:
        idle: Background lines that belong to no job.
        jump: Jumps of the clock by half a minute to a quarter of an hour, either way.
        bad_bytes: Lines with one byte that is not UTF-8.
        burst: Jobs with which 20 to 60 others start.
        gap: Mean seconds between the starts of two jobs; the smaller, the more interleaving.
    """

    idle: float = 0.02
    jump: float = 0.001
    bad_bytes: float = 0.002
    burst: float = 0.005
    gap: float = 4.0


@dataclass(frozen=True)
class Summary:
    """What `write_files` wrote: counts, and the place of the labels."""

    labels: Path
    num_lines: int
    num_jobs: int
    num_faulty: int
    num_bad: int
    num_jumps: int


@dataclass
class _Open:
    """A job that still has lines to write."""

    run: Run
    next: int
    guilty: list[int]


class _Writer:
    """Writes lines in their true order, dirt included, and the label of each job as it ends."""

    def __init__(
        self, raw: BinaryIO, table: Any, system: str, rng: random.Random, dirt: Dirt
    ) -> None:
        self.raw, self.table, self.rng, self.dirt = raw, table, rng, dirt
        self.system = SYSTEMS[system]
        self.queue: list[tuple[int, int]] = []
        self.jobs: dict[int, _Open] = {}
        self.shift = 0
        self.num_lines = self.num_bad = self.num_jumps = 0

    def add(self, job: Run) -> None:
        """Take a job whose lines are to be written when their time comes."""
        self.jobs[job.job] = _Open(job, 0, [])
        heapq.heappush(self.queue, (job.times[0], job.job))

    def advance(self, until: int | None) -> None:
        """Write every line before second `until`, or all that is left if it is None."""
        while self.queue and (until is None or self.queue[0][0] < until):
            seconds, number = heapq.heappop(self.queue)
            self._dirt(seconds)
            job = self.jobs[number]
            if job.next in job.run.guilty:
                job.guilty.append(self.num_lines)
            text = job.run.texts[job.next]
            self._line(header(self.system, seconds + self.shift, job.run.place, number) + text)
            job.next += 1
            if job.next < len(job.run.texts):
                heapq.heappush(self.queue, (job.run.times[job.next], number))
            else:
                guilty = " ".join(map(str, job.guilty))
                self.table.writerow((number, job.run.label, job.run.fault or "", guilty))
                del self.jobs[number]

    def _dirt(self, seconds: int) -> None:
        """Move the clock or write background lines, now and then."""
        rng = self.rng
        if rng.random() < self.dirt.jump:
            self.shift += rng.choice((-1, 1)) * rng.randint(30, 900)
            self.num_jumps += 1
        if rng.random() < self.dirt.idle:
            for _ in range(rng.choice((1, 1, 1, 1, 12))):
                start = header(self.system, seconds + self.shift, place := rng.randint(1, 8), None)
                text = self.system.templates[rng.choice(self.system.idle)]
                self._line(start + text.format(n=place, q=rng.randint(20, 90)))

    def _line(self, text: str) -> None:
        data = bytearray(text.encode())
        if self.rng.random() < self.dirt.bad_bytes:
            data[self.rng.randrange(len(data))] = self.rng.choice(_BAD_BYTES)
            self.num_bad += 1
        self.raw.write(bytes(data) + b"\n")
        self.num_lines += 1


def write_files(
    path: str | Path,
    system: str,
    num_jobs: int,
    seed: int = 0,
    fault_rate: float = 0.05,
    faults: Sequence[Fault] = FAULTS,
    dirt: Dirt | None = None,
    first_job: int = FIRST_STUDY_JOB,
) -> Summary:
    """Write a raw log file and, beside it, `<name>.labels.csv`.

    The labels have the columns `job,label,fault,guilty`; `guilty` are line numbers of the raw file,
    counted from 0, separated by spaces. Equal arguments give equal files.

    Args:
        path: The raw file; its folder must exist.
        system: Name of the system.
        num_jobs: Number of jobs; a job has about eleven lines.
        seed: Seed of the whole file.
        fault_rate: Share of faulty jobs.
        faults: Kinds of fault to draw from.
        dirt: How unclean the file is; default `Dirt()`.
        first_job: Number of the first job. Numbers below `FIRST_STUDY_JOB` are the base model's.
    """
    if first_job < FIRST_STUDY_JOB:
        raise ValueError(
            f"first_job must be at least {FIRST_STUDY_JOB}: lower jobs are the base's."
        )
    path, dirt = Path(path), dirt or Dirt()
    labels = path.with_name(path.name + ".labels.csv")
    rng = random.Random(f"{seed}/logs/{system}/{num_jobs}")
    num_faulty = together = 0
    start = rng.randrange(6 * 3600)
    with path.open("wb") as raw, labels.open("w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(("job", "label", "fault", "guilty"))
        writer = _Writer(raw, rows, system, rng, dirt)
        for job in range(first_job, first_job + num_jobs):
            if together:
                together -= 1
            else:
                start += int(rng.expovariate(1 / dirt.gap) + 0.5)
                together = rng.randint(20, 60) if rng.random() < dirt.burst else 0
            fault = rng.choice(faults) if rng.random() < fault_rate else None
            num_faulty += fault is not None
            writer.advance(start)
            own = random.Random(f"{seed}/{system}/{job}")
            writer.add(run(own, system, fault, job=job, start=start))
        writer.advance(None)
    return Summary(labels, writer.num_lines, num_jobs, num_faulty, writer.num_bad, writer.num_jumps)
