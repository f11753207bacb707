"""`reftune report`: compare run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reftune.cli.common import JsonFlag, note, print_json, print_table
from reftune.errors import DataError, RecipeError


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or report.json files.")],
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw the main figures: .png, .svg or .pdf."),
    ] = None,
    curves: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the training losses.")
    ] = None,
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Join runs that differ only in -seedN or -sN.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Compare runs: a table with intervals, and a plot if you like.

    Examples:

        reftune report runs/rank4 runs/rank8
        reftune report runs/* --plot figures.png --curves losses.png
        reftune report runs/loreft-s1 runs/loreft-s2 runs/loreft-s3 --seeds

    Of several folders those without a report (an unfinished run, a sweep, evaluations) are left
    out, with a remark. Whether two adapters differ on the same rows: `reftune eval A --against B`.
    """
    from reftune.report.model import Report
    from reftune.report.tables import report_table, result_table

    runs = finished(runs) if len(runs) > 1 else runs
    reports = [Report.read(run) for run in runs]
    rows = []
    if seeds:
        from reftune.report.results import collect

        rows = collect(runs)
    written = _draw(plot, curves, runs, reports)
    if json_:
        shown = (
            rows if seeds else [{"folder": run, **r.model_dump()} for run, r in zip(runs, reports)]
        )
        print_json({"rows" if seeds else "runs": shown, "plots": written})
        return
    table = result_table(rows) if seeds else report_table(reports)
    if markdown:
        print(table.to_markdown())
    else:
        print_table(table)
    for path in written:
        note(f"wrote {path}")


def finished(runs: list[str]) -> list[str]:
    """Return those of several places that hold a report; say which do not.

    What is not there at all stays in the list: a name with a typo must not go unseen.

    Raises:
        DataError: If none of them holds a report.
    """
    kept = []
    for run in runs:
        place = Path(run)
        is_other_file = place.is_file() and place.suffix != ".json"
        if is_other_file or (place.is_dir() and not (place / "report.json").is_file()):
            note(f"{run} is left out: it holds no report.json of a finished run.")
        else:
            kept.append(run)
    if not kept:
        raise DataError(
            f"None of the {len(runs)} places holds a report.json.",
            "Give run folders that have finished.",
        )
    return kept


def _draw(plot: str | None, curves: str | None, runs: list[str], reports: list) -> list[str]:  # type: ignore[type-arg]
    """Draw what was asked for; return the files."""
    written = []
    for path in filter(None, (plot, curves)):
        if Path(path).suffix not in (".png", ".svg", ".pdf"):
            raise RecipeError(f'"{path}" is no plot file.', "End it in .png, .svg or .pdf.")
    from reftune.report.plots import plot_reports, plot_training

    if plot:
        written.append(str(plot_reports(plot, reports)))
    if curves:
        made = plot_training(curves, runs)
        if made is None:
            note("None of the runs has a metrics.jsonl with a loss.")
        else:
            written.append(str(made))
    return written
