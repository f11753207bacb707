"""Logs: normal paths, faults with their guilty lines, shared meanings, raw files."""

from __future__ import annotations

import csv
import random
import re
from itertools import pairwise

import pytest

from reftune.nano import logs
from reftune.nano.item import split as split_of
from reftune.nano.logs_files import Dirt, write_files
from reftune.nano.logs_systems import SHOWN, SYSTEMS


def _legal(system, run):
    """Return the places at which a run leaves the workflow graph."""
    names = ("start", *run.templates, "end")
    return [
        place
        for place in range(len(names) - 1)
        if not logs.follows(SYSTEMS[system], names[place], names[place + 1])
    ]


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_complete(name):
    system = SYSTEMS[name]
    assert 25 <= len(system.templates) <= 40
    reached = {follower for choices in system.flow.values() for follower, _ in choices} - {"end"}
    assert reached == set(system.flow) - {"start"}
    assert reached | set(system.errors) | set(system.idle) == set(system.templates)
    assert not reached & set(system.errors)
    assert len(set(system.templates.values())) == len(system.templates)


def test_two_systems_share_meaning_in_other_words():
    shared = {}
    names = list(SYSTEMS)
    for first in names:
        for second in names[names.index(first) + 1 :]:
            common = set(SYSTEMS[first].meanings.values()) & set(SYSTEMS[second].meanings.values())
            shared[first, second] = len(common) / len(SYSTEMS[second].meanings)
            texts = set(SYSTEMS[first].templates.values()) & set(SYSTEMS[second].templates.values())
            assert not texts
    assert {pair for pair, share in shared.items() if share} == {("vault", "mesh")}
    assert shared["vault", "mesh"] == pytest.approx(0.4)
    mesh, vault = SYSTEMS["mesh"], SYSTEMS["vault"]
    for name, meaning in vault.meanings.items():
        if meaning in mesh.meanings.values():
            assert vault.templates[name].split(",")[0] != mesh.templates[name].split(",")[0]


@pytest.mark.parametrize("name", SYSTEMS)
def test_normal_runs_follow_the_graph(name):
    rng = random.Random(0)
    for _ in range(100):
        run = logs.run(rng, name)
        assert not _legal(name, run) and not run.guilty and run.label == 0
        assert not set(run.templates) & set(SYSTEMS[name].errors)
        assert list(run.times) == sorted(run.times)
        assert all(str(run.job) in line for line in run.lines)


@pytest.mark.parametrize("fault", logs.FAULTS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_faults_show_at_their_guilty_lines(name, fault):
    rng, system = random.Random(1), SYSTEMS[name]
    for _ in range(40):
        run = logs.run(rng, name, fault)
        assert run.label == 1 and run.guilty and max(run.guilty) < len(run.lines)
        bad, guilty = _legal(name, run), set(run.guilty)
        if fault == "error":
            assert {run.templates[place] for place in guilty} <= set(system.errors)
        elif fault in ("skip", "repeat"):
            # Place p of the path is the step into line p; leaving a repeated block may be legal.
            assert set(bad) == guilty if fault == "skip" else guilty <= set(bad)
        elif fault == "swap":
            assert len(guilty) == 2 and max(guilty) in bad
        elif fault == "value":
            numbers = [int(n) for n in re.findall(r"\d+", run.texts[run.guilty[0]])]
            assert max(numbers) >= 400 and not bad
        else:
            gaps = [b - a for a, b in pairwise(run.times)]
            assert [place + 1 for place, gap in enumerate(gaps) if gap >= 600] == list(run.guilty)


def test_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="one of error"):
        logs.run(random.Random(0), "vault", "eror")


def test_base_sees_normal_lines_of_two_systems():
    rng, train, held = random.Random(2), set(), set()
    for _ in range(400):
        item = logs.sample(rng)
        assert item.kind in SHOWN and item.question == "" and split_of("logs", *item.key) == "train"
        assert int(item.key[1]) < logs.FIRST_STUDY_JOB
        assert 2 <= len(item.answer.splitlines()) <= 6
        train.add(item.key)
        held.add(logs.sample(rng, "test").key)
    assert not train & held
    assert {system for system, _ in train} == set(SHOWN)
    with pytest.raises(ValueError, match="base sees"):
        logs.sample(rng, system="mesh")


def test_a_job_has_one_text():
    rng, texts = random.Random(3), {}
    for _ in range(2_000):
        item = logs.sample(rng, lines=30)
        assert texts.setdefault(item.key, item.answer) == item.answer
    assert len(texts) < 2_000


@pytest.mark.parametrize("name", SYSTEMS)
def test_lines_are_short(name):
    """Every word one token, every digit one token: the mean stays well under 25."""
    rng, cost, lines = random.Random(4), 0, 0
    for _ in range(100):
        for line in logs.run(rng, name).lines:
            cost += len(re.findall(r"\d| ?[A-Za-z]+|[^\w\s]| (?=\d)", line)) + 1
            lines += 1
    assert cost / lines < 23


def test_raw_file_and_labels(tmp_path):
    path = tmp_path / "mesh.log"
    dirt = Dirt(bad_bytes=0.01, jump=0.005, burst=0.02)
    summary = write_files(path, "mesh", 600, seed=5, fault_rate=0.2, dirt=dirt)
    raw = path.read_bytes().splitlines()
    rows = list(csv.DictReader(summary.labels.open()))
    assert len(raw) == summary.num_lines and len(rows) == 600 == len({row["job"] for row in rows})
    assert sum(row["label"] == "1" for row in rows) == summary.num_faulty > 80
    assert summary.num_bad and summary.num_jumps
    broken = []
    for place, line in enumerate(raw):
        try:
            line.decode()
        except UnicodeDecodeError:
            broken.append(place)
    assert len(broken) == summary.num_bad
    for row in rows:
        guilty = [int(place) for place in row["guilty"].split()]
        assert bool(guilty) == (row["label"] == "1") == bool(row["fault"])
        for place in guilty:
            assert f"f{row['job']}".encode() in raw[place] or place in broken
    jobs = [match[1] for line in raw if (match := re.search(rb"f(\d{5}) ", line))]
    assert sum(a != b for a, b in pairwise(jobs)) > len(jobs) / 3
    times = [int(line[:6]) for line in raw if line[:6].isdigit()]
    assert any(b < a for a, b in pairwise(times))
    assert any(b" idle " in line for line in raw)


def test_raw_files_are_reproducible_and_clean_on_request(tmp_path):
    clean = Dirt(idle=0, jump=0, bad_bytes=0, burst=0)
    for name in "ab":
        write_files(tmp_path / name, "gate", 50, seed=1, dirt=clean)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert " pool " not in (tmp_path / "a").read_text()
    with pytest.raises(ValueError, match="first_job"):
        write_files(tmp_path / "c", "gate", 5, first_job=1)
