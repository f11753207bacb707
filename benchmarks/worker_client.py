"""Talks to `pyreft_worker.py` in another Python environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import Settings

HOW = """The comparison needs pyreft in an environment of its own:
  python -m venv pyreft-env
  pyreft-env/bin/pip install torch "transformers>=5" "pyvene==0.1.8"
  pyreft-env/bin/pip install --no-deps "pyreft==0.1.0"  # it pins transformers 4.45.1
then pass --pyreft-python pyreft-env/bin/python"""


class WorkerError(RuntimeError):
    """The other process could not do what it was asked."""


class Worker:
    """A long-lived process with pyreft; steps are asked for one at a time.

    Args:
        python: Interpreter of the environment with pyreft.
        settings: Model and batch.
        **build: Further fields of the `build` request (`lr`, `fixed_rotation`).

    Raises:
        WorkerError: If the interpreter is missing or pyreft fails there.
    """

    def __init__(self, python: str, settings: Settings, **build: Any) -> None:
        script = Path(__file__).with_name("pyreft_worker.py")
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
        environment.pop("PYTHONPATH", None)
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.complaints,  # a file: a pipe nobody reads would fill up
                text=True,
                env=environment,
            )
        except OSError as error:
            raise WorkerError(f"{python} cannot be started ({error}).\n{HOW}") from error
        built = self.ask("build", settings=asdict(settings), **build)
        self.versions, self.checksum = built["versions"], built["checksum"]

    def ask(self, what: str, **more: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        line = ""
        try:
            self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            self.complaints.seek(0)
            tail = self.complaints.read().strip().splitlines()[-3:]
            raise WorkerError("pyreft's process ended: " + " | ".join(tail) + f"\n{HOW}")
        return json.loads(line)

    def step(self) -> float:
        """Return the seconds of one training step."""
        return self.ask("step")["seconds"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.complaints.close()
