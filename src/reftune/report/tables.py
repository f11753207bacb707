"""Tables of figures, for the terminal (rich) and for documents (Markdown).

A figure is printed with its spread over seeds and its interval; the best of a column is bold, and
a cell without a figure says so instead of looking like a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from reftune.report.model import BASELINES, Figure, Report, ResultRow, owner_of

if TYPE_CHECKING:
    import rich.table

OPEN = "open"
EDGE = 3
"""Blanks that a column of a table takes beside its text on the terminal."""
DIFFERENCE = "_difference"
"""Ending of metrics that are the difference of two rows."""
LOWER_IS_BETTER = {"seconds", "bytes", "nats", "ratio"}


@dataclass(frozen=True)
class Cell:
    """One entry: its text, and the number that decides which entry of a column is the best."""

    text: str
    value: float | None = None


@dataclass
class Table:
    """A table with a header, rows and, per column, which end is best.

    >>> table = Table(["method", "accuracy"], best=[None, "high"])
    >>> table.add("base", Cell("40 %", 0.4))
    >>> table.add("loreft", Cell("70 %", 0.7))
    >>> print(table.to_markdown())
    | method | accuracy |
    |---|---:|
    | base | 40 % |
    | loreft | **70 %** |
    """

    columns: list[str]
    best: list[Literal["high", "low"] | None] = field(default_factory=list)
    title: str = ""
    rows: list[list[Cell]] = field(default_factory=list)
    dispensable: list[str] = field(default_factory=list)
    """Columns that a narrow terminal may do without, the first to go first."""

    def add(self, *entries: str | Cell) -> None:
        """Add a row."""
        self.rows.append([entry if isinstance(entry, Cell) else Cell(entry) for entry in entries])

    def winners(self) -> set[tuple[int, int]]:
        """Return (row, column) of the best entries; ties share, a single number is no winner."""
        found = set()
        for column, rule in enumerate(self.best):
            values = [(row[column].value, i) for i, row in enumerate(self.rows)]
            numbers = [value for value, _ in values if value is not None]
            if rule is None or len(numbers) < 2:
                continue
            top = max(numbers) if rule == "high" else min(numbers)
            found.update((i, column) for value, i in values if value == top)
        return found

    def to_markdown(self) -> str:
        """Return a Markdown table."""
        winners = self.winners()
        numeric = [self._numeric(column) for column in range(len(self.columns))]
        lines = [_line(self.columns), "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
        for i, row in enumerate(self.rows):
            texts = [_escape(cell.text) for cell in row]
            marked = [f"**{text}**" if (i, j) in winners else text for j, text in enumerate(texts)]
            lines.append(_line(marked))
        return "\n".join(lines)

    def to_rich(self, width: int | None = None) -> rich.table.Table:
        """Return a table for a rich console.

        Args:
            width: Columns of the terminal. Heads and words are never cut: dispensable columns are
                left out, and named below, until the longest words of the others fit. None: all.
        """
        import rich.box
        import rich.table
        from rich.text import Text

        gone = [] if width is None else self._without_room(width)
        shown = [j for j, name in enumerate(self.columns) if name not in gone]
        widths = {} if width is None else self._widths(shown, width)
        table = rich.table.Table(
            title=self.title or None,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            caption=f"No room here for: {', '.join(gone)}." if gone else None,
            caption_justify="left",
        )
        for j in shown:
            justify = "right" if self._numeric(j) else "left"
            table.add_column(self.columns[j], justify=justify, overflow="fold", width=widths.get(j))
        winners = self.winners()
        for i, row in enumerate(self.rows):
            styles = ["bold green" if (i, j) in winners else "" for j in range(len(row))]
            dim = ["dim" if cell.text == OPEN else "" for cell in row]
            cells = [Text(cell.text, style=a or b) for cell, a, b in zip(row, styles, dim)]
            table.add_row(*(cells[j] for j in shown))
        return table

    def _without_room(self, width: int) -> list[str]:
        """Return the dispensable columns that do not fit beside the others."""
        needs = {name: self._longest_word(j) + EDGE for j, name in enumerate(self.columns)}
        gone: list[str] = []
        for name in self.dispensable:
            if sum(needs.values()) < width:
                break
            if needs.pop(name, None) is not None:
                gone.append(name)
        return gone

    def _widths(self, columns: list[int], width: int) -> dict[int, int]:
        """Share a terminal among columns: the longest word of each, then whole cells where it goes.

        Nothing where everything fits, or not even the words do.
        """
        least = {j: self._longest_word(j) for j in columns}
        whole = {j: max(map(len, self._texts(j))) for j in columns}
        room = width - 1 - EDGE * len(columns)
        if sum(whole.values()) <= room or sum(least.values()) > room:
            return {}
        spare = room - sum(least.values())
        for j in sorted(columns, key=lambda j: whole[j] - least[j]):
            more = min(spare, whole[j] - least[j])
            least[j] += more
            spare -= more
        return least

    def _longest_word(self, column: int) -> int:
        return max(len(word) for text in self._texts(column) for word in text.split() or [""])

    def _texts(self, column: int) -> list[str]:
        return [self.columns[column], *(row[column].text for row in self.rows)]

    def _numeric(self, column: int) -> bool:
        return any(row[column].value is not None for row in self.rows)


def show_figure(figure: Figure) -> str:
    """Return a figure as text: mean, spread over seeds, interval, unit.

    >>> show_figure(Figure(mean=0.724, sd=0.008, seeds=3, low=0.70, high=0.75))
    '72.4 ± 0.8 % [70.0, 75.0]'
    >>> show_figure(Figure(mean=12.34, unit="seconds"))
    '12.3 s'
    """
    if figure.mean is None:
        return OPEN
    number, ending = _units(figure.unit)
    text = number(figure.mean)
    if figure.sd is not None and figure.seeds > 1:
        text += f" ± {number(figure.sd)}"
    text += ending
    if figure.has_interval:
        text += f" [{number(figure.low)}, {number(figure.high)}]"
    return text


def show_bytes(size: float) -> str:
    """Return a size in the unit people read.

    >>> show_bytes(37_450), show_bytes(12)
    ('37.5 kB', '12 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def show_seconds(seconds: float) -> str:
    """Return a duration.

    >>> show_seconds(4.21), show_seconds(192)
    ('4.2 s', '3 min 12 s')
    """
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.2g} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def show_share(share: float) -> str:
    """Return a small share with enough digits to be read.

    >>> show_share(0.00031), show_share(0.25)
    ('0.031 %', '25 %')
    """
    return f"{share * 100:.2g} %" if share < 0.9995 else f"{share * 100:.0f} %"


def report_table(reports: Sequence[Report], title: str = "") -> Table:
    """Compare runs: one row each, and one for each baseline that a run brings.

    Args:
        reports: Runs. Figures `adapter_accuracy` and `base_accuracy` share a column `accuracy`.
        title: Printed above the table.
    """
    lines: list[tuple[Report, dict[str, Figure], str]] = []
    for report in reports:
        split = split_figures(report)
        for owner in BASELINES:
            known = [figures for _, figures, kind in lines if kind == owner]
            if owner in split and split[owner] not in known:
                lines.append((report, split[owner], owner))
        lines.append((report, split.get("adapter", {}), ""))
    names = list(dict.fromkeys(name for _, figures, _ in lines for name in figures))
    firsts = {name: next(f[name] for _, f, _ in lines if name in f) for name in names}
    better = [_better(name, firsts[name]) for name in names]
    table = Table(
        columns=["run", "method", "task", *names, "trained", "share", "adapter", "training"],
        best=[None, None, None, *better, None, None, None, None],
        title=title,
        dispensable=["share", "adapter", "training", "task", "trained"],
    )
    for report, figures, owner in lines:
        cells = [_figure_cell(figures.get(name)) for name in names]
        label = f"{owner} of {report.name}" if owner else report.name
        method = owner or " + ".join(report.methods)
        costs = [Cell("")] * 4 if owner else _costs(report)
        table.add(label, method, report.task, *cells, *costs)
    return table


def split_figures(report: Report) -> dict[str, dict[str, Figure]]:
    """Return the figures of each baseline and of the `adapter`, without their prefixes."""
    found: dict[str, dict[str, Figure]] = {}
    for name, figure in report.figures.items():
        owner, short = owner_of(name)
        found.setdefault(owner, {})[short] = figure
    return found


def result_table(rows: Sequence[ResultRow], title: str = "") -> Table:
    """Return a table of published figures; rows of one section, open cells as `open`."""
    metric = {row.metric for row in rows if row.metric}
    is_test = any(name.endswith(DIFFERENCE) for name in metric)  # the largest is no winner
    rules = {_better(row.metric, row.figure()) for row in rows if not (row.is_open or is_test)}
    table = Table(
        columns=["name", "method", "task", "model", "metric", "value", "rows", "trained", "time"],
        best=[None] * 5 + [rules.pop() if len(rules) == 1 and len(metric) == 1 else None],
        title=title,
        dispensable=["time", "rows", "model", "trained", "task"],
    )
    table.best += [None] * 3
    for row in rows:
        spent = "" if row.seconds is None else show_seconds(row.seconds)
        size = "" if row.n is None else f"{row.n:,}"
        table.add(
            _label(row.name, row.note),
            row.method,
            row.task,
            row.model,
            row.metric,
            Cell(show_figure(row.figure()), row.mean),
            size if row.seeds < 2 else f"{row.seeds} x {size}",
            "" if row.trainable is None else f"{row.trainable:,}",
            spent,
        )
    return table


def wide_table(rows: Sequence[ResultRow], title: str = "") -> Table:
    """Return one line a contender and one column a metric, for measures of several units.

    Rows belong to one contender if their names agree up to `:`. A contender with nothing measured
    is `open`, with the reason.
    """
    lines: dict[str, dict[str, ResultRow]] = {}
    for row in rows:
        lines.setdefault(row.name.split(":")[0], {})[row.metric] = row
    metrics = list(dict.fromkeys(row.metric for row in rows if row.metric))
    heads = [metric.replace("_", " ") for metric in metrics]
    table = Table(["name", *heads, "trained"], best=[None] * (len(heads) + 2), title=title)
    for name, found in lines.items():
        first = next(iter(found.values()))
        cells = [_row_cell(found.get(metric)) for metric in metrics]
        if all(row.is_open for row in found.values()):
            cells = [Cell(OPEN), *[Cell("")] * (len(metrics) - 1)]
        label = _label(name, first.note)
        table.add(label, *cells, "" if first.trainable is None else f"{first.trainable:,}")
    return table


def checked_table(rows: Sequence[ResultRow], title: str = "", with_metric: bool = False) -> Table:
    """Return values beside their bars and whether they hold; a missed bar says **no**.

    Args:
        rows: Results with `bar` and `holds`; those without a bar are shown for the reader.
        title: Printed above the table.
        with_metric: Whether to name the metric of each row.
    """
    heads = ["name", *(["metric"] if with_metric else []), "value", "rows", "bar", "holds"]
    table = Table(heads, best=[None] * len(heads), title=title)
    words = {True: "yes", False: "**no**", None: ""}
    for row in rows:
        name = row.name.split(":")[0] if with_metric else row.name
        label = _label(name, row.note)
        metric = [row.metric.replace("_", " ")] if with_metric else []
        size = "" if row.n is None else f"{row.n:,}"
        table.add(label, *metric, _row_cell(row), size, row.bar, words[row.holds])
    return table


def _label(name: str, note: str) -> str:
    """Return the name of a row inside its section, if it has one, and its note."""
    return (name.partition("/")[2] or name) + (f" ({note})" if note else "")


def _row_cell(row: ResultRow | None) -> Cell:
    return Cell("") if row is None else Cell(show_figure(row.figure()), row.mean)


def _costs(report: Report) -> list[Cell]:
    """Return trained parameters, their share, size of the adapter and time of training."""
    facts: list[tuple[float | None, Callable[[float], str]]] = [
        (report.trainable_parameters, lambda value: f"{value:,}"),
        (report.trainable_fraction, show_share),
        (report.adapter_bytes, show_bytes),
        (report.train_seconds, show_seconds),
    ]
    return [Cell("" if value is None else show(value), value) for value, show in facts]


def _figure_cell(figure: Figure | None) -> Cell:
    return Cell("") if figure is None else Cell(show_figure(figure), figure.mean)


def _better(name: str, figure: Figure) -> Literal["high", "low"]:
    lower = figure.unit in LOWER_IS_BETTER or "loss" in name or "perplexity" in name
    return "low" if lower else "high"


def _units(unit: str) -> tuple[Callable[[float], str], str]:
    """Return how to print a number of a unit, and what follows it."""
    if unit == "share":
        return lambda value: f"{value * 100:.1f}", " %"
    if unit == "seconds":
        return lambda value: f"{value:.3g}", " s"
    if unit == "bytes":
        return show_bytes, ""
    if unit == "ratio":
        return lambda value: f"{value:.2f}", ""
    return lambda value: f"{value:,.4g}", f" {unit}" if unit else ""


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
