"""The four machines whose logs sub-world E invents: what they say and in which order.

`vault` stores objects on disks, `herd` schedules batch jobs, `gate` is a web gateway, `mesh` a
fabric of switches. A template has a *meaning*; `vault` and `mesh` share 12 of their 30 meanings
(40 %) in other words, which is what the cross-data study needs; no other pair shares one. `flow` is
the workflow graph of a job: `node: next next*weight ...`; paths run from `start` to `end`. By
convention the last successor leads on, so a walk that has become long takes it.

Slots: `{d}` a duration and `{q}` a fill level (both drawn anew), `{k}` the running number of
pieces, `{s}` size, `{m}` client, `{n}` place and `{p}` other place (fixed for a job).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One simulated machine.

    Attributes:
        name: Its name, also the kind of its items.
        header: What precedes every line of a job: `{t}` time, `{j}` job, `{n}` place.
        idle_header: The same for lines that belong to no job.
        templates: Name of each template and its text. All but `errors` and `idle` occur normally.
        meanings: Meaning of each template; equal strings mean the same in two systems.
        flow: Workflow graph: node to its successors with weights.
        steps: Nodes that take the next piece, so that `{k}` grows.
        errors: Templates that occur in faulty jobs only.
        idle: Templates of background lines without a job.
    """

    name: str
    header: str
    idle_header: str
    templates: dict[str, str]
    meanings: dict[str, str]
    flow: dict[str, tuple[tuple[str, float], ...]]
    steps: frozenset[str]
    errors: tuple[str, ...]
    idle: tuple[str, ...]


def _rows(text: str) -> dict[str, str]:
    """Read `name: rest` lines."""
    pairs = (line.split(":", 1) for line in text.strip().splitlines())
    return {name.strip(): rest.strip() for name, rest in pairs}


def _flow(text: str) -> dict[str, tuple[tuple[str, float], ...]]:
    """Read `node: next next*weight` lines."""
    flow = {}
    for node, rest in _rows(text).items():
        parts = (part.partition("*") for part in rest.split())
        flow[node] = tuple((name, float(weight or 1)) for name, _, weight in parts)
    return flow


def _system(
    name: str,
    header: str,
    idle_header: str,
    templates: str,
    flow: str,
    steps: str,
    errors: str,
    idle: str,
    shared: tuple[str, ...] = (),
) -> System:
    """Build a system; templates not in `shared` mean something of their own."""
    rows = _rows(templates)
    meanings = {row: row if row in shared else f"{name} {row}" for row in rows}
    return System(
        name,
        header,
        idle_header,
        rows,
        meanings,
        _flow(flow),
        frozenset(steps.split()),
        tuple(errors.split()),
        tuple(idle.split()),
    )


SHARED: tuple[str, ...] = (
    *("open", "admit", "reserve", "piece", "checked", "again", "slow"),
    *("seal", "release", "closed", "lost", "bad_sum"),
)
"""Meanings that `vault` and `mesh` have in common."""

VAULT = _system(
    "vault",
    "{t} v{n} b{j} ",
    "{t} v{n} - ",
    """
    open: request opened, size {s}
    admit: client {m} accepted
    place: copies go to disks {n} and {p}
    reserve: room for {s} kept free
    piece: block {k} stored in {d} ms
    checked: block {k} sum good
    again: block {k} stored again
    slow: disk slow, waiting {d} ms
    sync: copies in step after {d} ms
    index: index entry written
    seal: object sealed
    release: room given back
    closed: request closed
    lookup: index searched in {d} ms
    hit: object found in cache
    miss: not in cache, reading disk {p}
    read: block {k} read in {d} ms
    send: block {k} sent to client {m}
    warm: cache filled
    scan: scan of disk {n} begins
    mark: {s} old blocks marked
    erase: old block {k} erased
    pack: disk packed in {d} ms
    level: disk {n} at {q} percent
    lost: block {k} lost
    bad_sum: block {k} sum wrong
    full: disk {p} full
    torn: index entry torn
    single: second copy missing
    beat: disk {n} alive, {q} percent
    """,
    """
    start: open*5 scan
    open: admit
    admit: lookup*3 place*3
    place: reserve
    reserve: piece
    piece: slow*0.15 again*0.1 checked
    slow: checked
    again: checked
    checked: piece*0.8 sync
    sync: index
    index: seal
    seal: release
    release: closed
    lookup: hit miss
    hit: send
    miss: read
    read: send
    send: read*0.6 warm*0.3 closed
    warm: closed
    scan: level
    level: mark
    mark: erase
    erase: erase*0.8 pack
    pack: closed
    closed: end
    """,
    "piece read erase",
    "lost bad_sum full torn single",
    "beat",
    SHARED,
)

MESH = _system(
    "mesh",
    "{t} sw{n} f{j} ",
    "{t} sw{n} idle ",
    """
    open: circuit asked for, width {s}
    admit: sender p{m} let in
    reserve: lane of width {s} set aside
    piece: frame {k} passed, {d} us
    checked: frame {k} crc fine
    again: frame {k} repeated
    slow: uplink lags by {d} us
    seal: stream complete
    release: lane handed over
    closed: circuit torn down
    lost: frame {k} dropped
    bad_sum: frame {k} crc mismatch
    route: path via sw{p} chosen
    learn: address of p{m} learned
    tag: tag {s} applied
    fill: buffer level {q}
    pause: pause sent to p{m}
    resume: p{m} resumes
    mirror: copy sent to probe port
    drain: traffic moved off port {n}
    flash: image written, {d} us
    reboot: line card restarts
    probe: loop test answered, {d} us
    join: port {n} joins trunk
    clear: counters cleared
    flap: port {n} flapping
    circle: loop seen on trunk
    hot: card {n} overheats
    no_path: nothing reaches p{m}
    pulse: clock pulse, level {q}
    """,
    """
    start: open*5 drain
    open: admit
    admit: learn*0.5 route
    learn: route
    route: tag*0.4 reserve
    tag: reserve
    reserve: piece
    piece: slow*0.15 again*0.1 fill*0.3 checked
    slow: checked
    again: checked
    fill: pause*0.5 checked
    pause: resume
    resume: checked
    checked: piece*0.8 mirror*0.2 seal
    mirror: seal
    seal: release
    release: closed
    drain: flash
    flash: reboot
    reboot: probe
    probe: probe*0.6 join
    join: clear
    clear: closed
    closed: end
    """,
    "piece probe",
    "lost bad_sum flap circle hot no_path",
    "pulse",
    SHARED,
)

HERD = _system(
    "herd",
    "{t} rack{n} job {j}: ",
    "{t} rack{n} herd: ",
    """
    submit: submitted by user {m}
    limits: limits checked
    queue: queued at place {q}
    raise: priority raised
    wait: waits for job {p}
    ready: wait is over
    grant: {s} cores granted
    stage: input copied in {d} s
    launch: launched on rack {n}
    task: task {k} started
    end_task: task {k} done in {d} s
    save: state saved
    urgent: paused for urgent work
    go_on: continued
    memory: memory near limit, {q} percent
    retry: task {k} tried again
    split: split into {s} parts
    part: part {k} done in {d} s
    merge: parts merged
    gather: results gathered
    clean: scratch cleaned
    charge: user {m} charged {s} units
    mail: user {m} told
    finish: finished, code 0
    oom: task {k} killed, no memory
    crash: task {k} ended, code 1
    gone: rack {n} gone
    quota: limit exceeded by user {m}
    no_input: input not found
    cycle: round over, {q} waiting
    """,
    """
    start: submit
    submit: limits
    limits: queue*3 split
    queue: raise*0.2 wait*0.3 grant
    raise: grant
    wait: ready
    ready: grant
    grant: stage
    stage: launch
    launch: task
    task: memory*0.15 retry*0.1 urgent*0.1 end_task
    memory: end_task
    retry: end_task
    urgent: go_on
    go_on: end_task
    end_task: task*0.7 save*0.3 gather
    save: gather
    split: part
    part: part*0.8 merge
    merge: gather
    gather: clean
    clean: charge
    charge: mail*0.4 finish
    mail: finish
    finish: end
    """,
    "task part",
    "oom crash gone quota no_input",
    "cycle",
)

GATE = _system(
    "gate",
    "{t} gw{n} r{j} ",
    "{t} gw{n} pool ",
    """
    get: GET by {m}
    post: POST by {m}
    secure: handshake took {d}
    token: token valid
    guest: guest visitor
    rate: rate {q} of 100
    cart: handler cart
    shop: handler shop
    kept: page from store
    unkept: page not in store
    call: backend {p} called
    reply: backend {p} replied, {d}
    anew: backend {p} called anew
    late: backend {p} sluggish, {d}
    zip: body zipped
    form: form part {k} came in, {d}
    virus: form scanned
    keep: form kept
    cookie: cookie renewed
    noted: visit noted
    ok: status 200 after {d}
    made: status 201 after {d}
    same: status 304
    bye: link ends
    broken: status 500
    refused: token refused
    silent: backend {p} silent
    cut: body cut short
    circle: redirect circle
    flood: too many visits by {m}
    size: pool size {q}
    """,
    """
    start: get*3 post
    get: secure
    post: secure
    secure: token*2 guest
    token: cookie*0.3 rate
    cookie: rate
    guest: rate
    rate: form*0.4 cart*0.5 shop
    cart: call
    shop: kept unkept
    kept: same*0.5 ok
    unkept: call
    call: late*0.15 anew*0.1 reply
    late: reply
    anew: reply
    reply: zip*0.5 ok
    zip: ok
    form: form*0.7 virus
    virus: keep
    keep: made
    ok: noted*0.5 bye
    made: noted*0.5 bye
    same: bye
    noted: bye
    bye: end
    """,
    "form",
    "broken refused silent cut circle flood",
    "size",
)

SYSTEMS: dict[str, System] = {system.name: system for system in (VAULT, HERD, GATE, MESH)}
SHOWN: tuple[str, ...] = ("vault", "herd")
"""Systems whose normal lines the base model sees."""
