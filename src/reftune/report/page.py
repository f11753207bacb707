"""`docs/results.md` from rows: a section per table, its plot, its versions and commands."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from reftune.report.model import ResultRow
from reftune.report.plots import forest, over
from reftune.report.tables import checked_table, result_table, wide_table
from reftune.report.trades import TRADES, trades

HEAD = """# Results

Made from `results.json` by `python -m reftune.report.results`; do not edit. Values are means over
seeds ± standard deviation over seeds, with a 95 % interval in brackets that covers both the choice
of test rows and the seeds. Bold is the best mean of a table, which is no claim of significance.
`open` is a cell that has not been run yet. Below each table stand the commands that made it.

`time` is training and evaluation together, summed over seeds, on a machine that had other work
too: what a row costs to make again, not which method is faster; sections `speed` and `causal`
measure that. `bar` is what this project asks of a value, no published figure, and `holds` says
whether the value meets it.
"""

ABOUT = {
    "demo": "What `make demo` prints: one seed. LoRA takes LoReFT's learning rate, not one that "
    "was sought for it.",
    "families": "Learning rates were chosen on validation rows, as `recipes/grids/families.yaml` "
    "tells. Differences are paired: same questions, same seeds.",
    "passages": "Learning rates were chosen on validation rows, as `recipes/grids/passages.yaml` "
    "tells; DiReFT has LoReFT's.",
    "ablation": "One setting is changed at a time. Every row has the learning rate that was chosen "
    "for `loreft`, none one of its own.",
    "brep": "BREP beside RED, LoReFT and LoRA at equal data and steps, trained on prose solutions "
    "of nano's known families. Trained was `format_accuracy`; `accuracy` counts the last number in "
    "any form and is the skill that was there before, on known families and on half, new, far.",
    "heft": "LoRA, ReFT, and HEFT (one after the other) at equal epochs on nano's passages, kinds "
    "3 and 4. Differences are paired: same questions, same seeds. In pictures over the seconds of "
    "training, points above one another took equally long.",
    "smoke": "Real data on the embedded model, to show that loader, training and score work: one "
    "seed, few rows. They say nothing about a method.",
    "speed": "Random models; medians over rounds in which the contenders take turns, ratios "
    "within a round, peak bytes of one step.",
    "causal": "Causal caching on random models, by prompt and answer length. Position sets: a, the "
    "first and last 4 prompt tokens; b, last 4; c, the response (all layers); g, the last prompt "
    "token at three late layers. Plain hooks, logits at labels (lean), recomputed, stored.",
    "parity": "reftune's LoReFT against pyreft's from equal weights. A value holds if it is "
    "within its bar.",
    "gates": "What the embedded model can do before anything is trained on it. A bar that is "
    "missed stays in the table.",
}
"""A sentence under the headings of known sections, in the order in which they stand first."""

ORDER = ("demo", "families", "passages", "brep", "heft", "ablation", "smoke", "speed", "causal")
ORDER += ("parity", "gates")
MANY = 6
"""More commands than this are folded away."""


def page(rows: Sequence[ResultRow], folder: Path, titles: Mapping[str, str] | None = None) -> str:
    """Return the page and draw its plots.

    Args:
        rows: All published rows.
        folder: Folder of the page; plots go to `plots/` in it.
        titles: Titles of sections by the first part of the rows' names.
    """
    sections: dict[str, list[ResultRow]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    known = [section for section in ORDER if section in sections]
    parts = [HEAD]
    for section in [*known, *(section for section in sections if section not in ORDER)]:
        title = (titles or {}).get(section) or section.replace("_", " ").capitalize()
        parts.append(f"## {title}\n")
        if section in ABOUT:
            parts.append(f"{ABOUT[section]}\n")
        parts += _tables(section, sections[section], folder)
        parts += _origin(sections[section])
    open_rows = [row.name for row in rows if row.is_open]
    if open_rows:
        parts.append(f"## Open cells\n\n{len(open_rows)} of {len(rows)}: {', '.join(open_rows)}.\n")
    return "\n".join(parts)


def _tables(section: str, rows: list[ResultRow], folder: Path) -> list[str]:
    """Choose a form: several units side by side, values against bars, or one table a metric."""
    done = [row for row in rows if not row.is_open]
    bars = [row for row in rows if row.bar]
    if len({row.unit for row in done}) > 1:
        parts = [wide_table(rows).to_markdown() + "\n"]
        ratio = next((row.metric for row in done if row.unit == "ratio"), "")
        members = [row for row in done if row.metric == ratio]
        pictures = _over(section, ratio, members, folder, section)
        parts += pictures or _plot(section, ratio, members, folder)
        if bars:
            parts += ["### Bars\n", checked_table(bars, with_metric=True).to_markdown() + "\n"]
        return parts
    if bars:
        return [checked_table(rows).to_markdown() + "\n"]
    return _by_metric(section, rows, folder)


def _by_metric(section: str, rows: list[ResultRow], folder: Path) -> list[str]:
    """Return one table and plot a metric; open rows stand in the table of the main one."""
    main = next((row.metric for row in rows if row.metric), "")
    by_metric: dict[str, list[ResultRow]] = {}
    for row in rows:
        by_metric.setdefault(row.metric or main, []).append(row)
    parts = []
    for index, (metric, members) in enumerate(by_metric.items()):
        if len(by_metric) > 1:
            parts.append(f"### {section.capitalize()}: {metric.replace('_', ' ')}\n")
        parts.append(result_table(members).to_markdown() + "\n")
        stem = section if index == 0 else f"{section}-{metric}"
        pictures = _over(section, metric, members, folder, stem)
        # What a curve shows would only make the other picture long.
        rest = [row for row in members if not row.x] if pictures else members
        parts += [*pictures, *_plot(section, metric, rest, folder, stem)]
    return [*parts, *_trades(section, rows, folder)]


def _trades(section: str, rows: list[ResultRow], folder: Path) -> list[str]:
    """Draw what is gained against what is lost, in sections that ask for it."""
    if section not in TRADES:
        return []
    gained, kept = TRADES[section]
    title, name = f"{section}: what is gained against what is lost", f"{section}-trade.png"
    if trades(folder / "plots" / name, rows, gained, kept, title) is None:
        return []
    return [f"![{title}](plots/{name})\n"]


def _over(
    section: str, metric: str, rows: Sequence[ResultRow], folder: Path, stem: str
) -> list[str]:
    """Draw a picture over each axis on which a line has two points."""
    done = [row for row in rows if not row.is_open]
    parts = []
    for axis in dict.fromkeys(key for row in done for key in row.x):
        lines = Counter(row.line for row in done if axis in row.x)
        if max(lines.values()) < 2 or len({row.unit for row in done}) != 1:
            continue
        name = re.sub(r"[^\w.-]+", "-", f"{stem}-over-{axis}") + ".png"
        title = f"{section}: {metric} over {axis}".replace("_", " ")
        over(folder / "plots" / name, done, axis, title)
        parts.append(f"![{title}](plots/{name})\n")
    return parts


def _plot(
    section: str, metric: str, rows: Sequence[ResultRow], folder: Path, stem: str = ""
) -> list[str]:
    """Draw a forest plot if there are two values to compare."""
    done = [row for row in rows if not row.is_open]
    if len(done) < 2 or len({row.unit for row in done}) != 1:
        return []
    name = re.sub(r"[^\w.-]+", "-", stem or section) + ".png"
    title = f"{section}: {metric.replace('_', ' ')}"
    forest(folder / "plots" / name, rows, title)
    return [f"![{title}](plots/{name})\n"]


def _origin(rows: Sequence[ResultRow]) -> list[str]:
    """Return settings, versions and commands behind the rows of a section."""
    done = [row for row in rows if not row.is_open]
    parts = [f"Settings: {text}.\n" for text in dict.fromkeys(row.setting for row in done) if text]
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in row.versions.items()) for row in done
    )
    parts += [f"Versions: {text}.\n" for text in versions if text]
    commands = list(dict.fromkeys(row.command for row in done if row.command))
    if not commands:
        return parts
    block = "```bash\n" + "\n".join(commands) + "\n```\n"
    if len(commands) > MANY:
        summary = f"{len(commands)} commands"
        block = f"<details><summary>{summary}</summary>\n\n{block}</details>\n"
    return [*parts, block]
