"""The `reftune` command: joins the verbs and turns errors into one line and an exit code.

Exit codes: 0 done, 1 unexpected, 2 recipe or usage, 3 data, 4 model, adapter, site or position,
5 training, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from reftune import __version__
from reftune.cli import (
    chat,
    convert,
    demo,
    diagnose,
    doctor,
    eval,
    generate,
    inspect,
    judge,
    methods,
    recipes,
    report,
    sample,
    stopping,
    sweep,
    train,
)
from reftune.cli.stopping import TERMINATED, Interrupted, Terminated
from reftune.errors import ReftuneError, TrainingError

EXIT_CODES = """\
**Exit codes:** 0 done · 1 unexpected · 2 recipe or usage · 3 data ·
4 model, adapter, site or position · 5 training · 130 interrupted · 143 terminated"""


class Group(TyperGroup):
    """A command group that reports Ctrl-C like any other error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(
                "Interrupted.", "Nothing under a final name is half-written."
            ) from None


app = typer.Typer(
    cls=Group,
    name="reftune",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)

for name, verb in {
    "demo": demo.demo,
    "train": train.train,
    "eval": eval.evaluate,
    "generate": generate.generate,
    "chat": chat.chat,
    "inspect": inspect.inspect,
    "judge": judge.judge,
    "sample": sample.sample,
    "sweep": sweep.sweep,
    "report": report.report,
    "methods": methods.methods,
    "recipes": recipes.recipes,
    "convert": convert.convert,
    "doctor": doctor.doctor,
}.items():
    app.command(name)(verb)
app.add_typer(diagnose.app, name="diagnose")


def _version(value: bool) -> None:
    if value:
        print(f"reftune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")] = False,
) -> None:
    """Adapt language models by their representations and by rewards.

    A first round, without any download:

        reftune demo              # watch an adapter learn, in minutes
        reftune recipes           # what there is to start from
        reftune inspect RECIPE    # which tokens are edited, which are learned
        reftune train RECIPE      # train, evaluate, save
        reftune chat runs/NAME    # talk to the result

    `reftune VERB --help` explains each verb with examples.
    """
    if quiet and not debug:
        _set_up_logging(False, True)
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    stopping.install()
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows "?" for what it lacks
        if "utf" not in (getattr(stream, "encoding", None) or "utf").lower():
            stream.reconfigure(errors="replace")
    try:
        code = main(argv)
    except KeyboardInterrupt:  # between two steps of main itself
        code = _report(KeyboardInterrupt(), False)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; default are the process's.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug, arguments = _take(arguments, "--debug")
    quiet, arguments = _take(arguments, "--quiet")
    _set_up_logging(debug, quiet)
    try:
        command = typer.main.get_command(app)
        code = command.main(arguments, prog_name="reftune", standalone_mode=False)
        if code == Interrupted.exit_code:  # Ctrl-C before the verb began, which typer keeps
            return _report(KeyboardInterrupt(), "--json" in arguments)
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        verb = next((word for word in arguments if not word.startswith("-")), "")
        return _report(error, "--json" in arguments, verb)


def _take(arguments: list[str], flag: str) -> tuple[bool, list[str]]:
    """Take a flag out of the arguments, wherever it stands before `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [word for word in arguments[:end] if word != flag]
    return len(kept) < end, kept + arguments[end:]


def _report(error: BaseException, as_json: bool, verb: str = "train") -> int:
    """Print an error in one go on standard error; return the exit code."""
    if isinstance(error, SystemExit) and error.code != TERMINATED:
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    known = translate(error, verb)
    if isinstance(known, Interrupted | Terminated):
        stopping.settle()
    _print_error(str(known))
    if as_json:
        from reftune.cli.common import print_json

        faults = [str(fault) for fault in getattr(known, "faults", [])]
        facts = {"type": type(known).__name__, "message": known.what, "remedy": known.remedy}
        print_json({"error": {**facts, "exit_code": known.exit_code, "faults": faults}})
    return known.exit_code


def translate(error: BaseException, verb: str = "train") -> ReftuneError:
    """Turn any error into one the user can act on; `verb` is the command it came from."""
    if isinstance(error, ReftuneError):
        return error
    if type(error).__name__ == "Abort" and isinstance(error.__cause__, EOFError):
        return translate(error.__cause__, verb)  # typer takes every end of a file for Ctrl-D
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return Interrupted("Interrupted.")
    if isinstance(error, SystemExit):
        return Terminated("Terminated.", "Nothing under a final name is half-written.")
    if hasattr(error, "format_message"):  # a usage error of typer, whichever click it carries
        return _usage(error)
    if no_space_left(error):
        return TrainingError(
            "No space left on the device; files already complete are untouched.",
            "Free space, or choose another place with --output, then go on with --resume."
            if verb == "train"
            else "Free space, then run the command again.",
        )
    text = str(error).strip().splitlines() or [""]
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in text[0].lower():
        return TrainingError(
            f"Out of memory: {text[0]}",
            "Use a smaller micro_batch_size or max_len, or gradient_checkpointing: true.",
        )
    if isinstance(error, OSError):
        return ReftuneError(
            f"{type(error).__name__}: {error}.", "Check the path and its permissions."
        )
    told = text[0] if text[0].endswith((".", "!", "?")) else f"{text[0]}."
    what = f"Unexpected {type(error).__name__}: {told}"
    return ReftuneError(what, "Run again with --debug to see where; please report it.")


def no_space_left(error: BaseException | None) -> bool:
    """Return whether an error, or one it came from, says that the disk or quota is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # what writers in Rust and C++ raise
            return True
        error = error.__cause__ or error.__context__
    return False


def _usage(error: Any) -> ReftuneError:
    from reftune.errors import RecipeError

    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "reftune")
    message = error.format_message().strip()
    message = message if message.endswith((".", "?", "!")) else f"{message}."
    return RecipeError(message, f"`{path} --help` shows how.")


def _print_error(text: str) -> None:
    from reftune.cli.common import err, is_main_process

    if not is_main_process():
        return
    from rich.text import Text

    err().print(Text("reftune: ", style="bold red") + Text(text), soft_wrap=True)


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Return whether a remark of a tokenizer is worth reading.

    It says that a long text "will result in indexing errors" when it is tokenised, before reftune
    cuts or refuses it, and says so.
    """
    return "sequence length is longer than the specified maximum" not in record.getMessage()


def _set_up_logging(debug: bool, quiet: bool) -> None:
    """Log to standard error: reftune's own remarks, others' warnings."""
    from reftune.cli.common import is_main_process

    handler = logging.StreamHandler()
    handler.name = "reftune"
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if debug else "%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [other for other in root.handlers if other.name != "reftune"] + [handler]
    if not debug:  # remarks of one library about another, which no user can act on
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT")
    tokenizers = logging.getLogger("transformers.tokenization_utils_base")
    change = tokenizers.removeFilter if debug else tokenizers.addFilter
    change(_is_no_false_alarm)
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    talk = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.getLogger("reftune").setLevel(talk if is_main_process() else logging.ERROR)
    hub = logging.getLogger("huggingface_hub")  # a line for each of many tries
    hub.setLevel(logging.DEBUG if debug else logging.ERROR)
    for name in ("matplotlib", "PIL", "urllib3", "filelock", "asyncio", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    run()
