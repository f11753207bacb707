"""Progress on standard error: a bar on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Shows loss, tokens/s and remaining time on standard error.

    A bar on a terminal; elsewhere a plain line about every tenth of the run, at most one in five
    seconds.

    Args:
        title: What is trained.
        stream: Where to write; default standard error.
    """

    QUIET = 5.0

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title, self.stream = title, stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last = 0.0
        self._first_step = self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._start, self._first_step, self._tokens = time.perf_counter(), state.global_step, 0
        self._last = self._start
        if not state.is_world_process_zero or not _is_terminal(self.stream):
            return
        self._bar = _rich_bar(self.stream)
        self._task = self._bar.add_task(
            self.title, total=state.max_steps, completed=state.global_step, note=""
        )
        self._bar.start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Move on."""
        if not state.is_world_process_zero or "loss" not in logs:
            return
        seconds = max(time.perf_counter() - self._start, 1e-9)
        note = f"loss {logs['loss']:.3f}  {logs.get('tokens', 0) / seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, note=note)
            return
        is_last = state.global_step >= state.max_steps
        tenth = max(1, state.max_steps // 10)
        quiet = time.perf_counter() - self._last < self.QUIET
        if is_last or (state.global_step % tenth == 0 and not quiet):
            done = state.global_step - self._first_step
            left = (state.max_steps - state.global_step) * seconds / max(done, 1)
            where = f"step {state.global_step}/{state.max_steps}"
            line = f"{self.title}  {where}  {note}  {_clock(left)} left"
            print(line, file=self.stream, flush=True)
            self._last = time.perf_counter()

    def close(self) -> None:
        """Close the bar; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Counting:
    """Shows how far something that counts has got; call it with (done, total).

    Args:
        title: What is counted.
        stream: Where to write; default standard error.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title, self.stream = title, stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if _is_terminal(self.stream):
            if self._bar is None:
                self._bar = _rich_bar(self.stream)
                self._task = self._bar.add_task(self.title, total=total, note="")
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
        elif time.perf_counter() - self._last >= Progress.QUIET:
            print(f"{self.title}  {done}/{total}", file=self.stream, flush=True)
            self._last = time.perf_counter()

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _rich_bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )


def _clock(seconds: float) -> str:
    """Return minutes and seconds.

    >>> _clock(75), _clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
