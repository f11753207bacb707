"""`reftune chat`: talk to a model, with and without its adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import load_any, note, out
from reftune.errors import RecipeError, ReftuneError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = "__base__"
HELP = """\
/base             answer with the base model alone
/adapter [NAME]   answer with an adapter again; without NAME list them
/compare TEXT     one answer of the base model and one of the adapter
/system TEXT      instructions that stand before the conversation
/temperature T    0 is greedy
/reset            forget the conversation
/help             this list
/quit             leave (also Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: Annotated[str, typer.Argument(help="Base model, adapter, stack or run folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Load one more adapter. Repeatable."),
    ] = None,
    system: Annotated[str, typer.Option(help="Instructions before the conversation.")] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue plain text: no chat template, no memory.")
    ] = False,
    template: Annotated[
        str, typer.Option(help='With --raw, around each input: "Question: {prompt} Answer:".')
    ] = "{prompt}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
) -> None:
    """Talk to a model; words appear as they are generated.

    Examples:

        reftune chat runs/demo
        reftune chat runs/demo --adapter other=runs/rank8 --temperature 0.7

    In the chat, `/base` switches the adapter off and `/adapter` on again, `/compare TEXT` asks
    both, `/help` lists the rest.
    """
    if "{prompt}" not in template:
        raise RecipeError(f'The template "{template}" has no place.', "Write {prompt} in it.")
    loaded, tokenizer = load_any(model)
    names = _load_more(loaded, adapter or [])
    if not raw and not getattr(tokenizer, "chat_template", None):
        note("The tokenizer has no chat template: plain text is continued, without memory.")
        raw = True
    settings = {"max_new_tokens": max_new_tokens, "top_p": top_p, "seed": seed}
    session = Session(
        answer=_answerer(loaded, tokenizer, settings),
        adapters=names,
        raw=raw,
        template=template,
        system=system,
        temperature=temperature,
        name=names[0] if names else None,
    )
    note(f"{model}" + (f" with {', '.join(names)}" if names else "") + ". /help lists commands.")
    loop(session, _read_line)


@dataclass
class Session:
    """A conversation and how it is answered.

    `answer(prompt, name, temperature)` yields pieces of text; name None is the model as it is.
    """

    answer: Callable[[Any, str | None, float], Iterator[str]]
    adapters: list[str] = field(default_factory=list)
    raw: bool = False
    template: str = "{prompt}"
    system: str = ""
    temperature: float = 0.0
    name: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, text: str) -> Any:
        """Return what the model is given for a line of the user."""
        if self.raw:
            return self.template.replace("{prompt}", text)
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.history, {"role": "user", "content": text}]

    def say(self, text: str, name: str | None, remember: bool = True) -> str:
        """Answer a line, printing as it comes; Ctrl-C keeps what was said so far."""
        pieces: list[str] = []
        stream = self.answer(self.prompt(text), name, self.temperature)
        try:
            for piece in stream:
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            close = getattr(stream, "close", None)
            if close is not None:
                close()
            sys.stdout.write(" ...")
        sys.stdout.write("\n")
        sys.stdout.flush()
        said = "".join(pieces)
        if remember and not self.raw:
            self.history += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": said},
            ]
        return said


def loop(session: Session, read: Callable[[str], str]) -> None:
    """Read lines and answer them until /quit or the end of the input."""
    while True:
        label = "base" if session.name == BASE else session.name or ""
        try:
            line = read(f"{label}> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not command(session, line):
                    return
            else:
                session.say(line, session.name)
        except ReftuneError as error:
            note(str(error))  # one bad line must not end the conversation


def command(session: Session, line: str) -> bool:
    """Do what a line that begins with / asks for; return False to leave.

    Raises:
        RecipeError: If there is no such command or adapter.
    """
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in ("/quit", "/exit", "/q"):
        return False
    actions: dict[str, Callable[[Session, str], None]] = {
        "/help": lambda *_: out().print(HELP, markup=False),
        "/base": _base,
        "/adapter": _adapter,
        "/compare": _compare,
        "/system": _system,
        "/temperature": _temperature,
        "/reset": _reset,
    }
    if word not in actions:
        raise RecipeError(f'There is no command "{word}".', nearest(word, [*actions, "/quit"]))
    actions[word](session, rest)
    return True


def _base(session: Session, _: str) -> None:
    if not session.adapters:
        raise RecipeError("This is the base model already.", "Give an adapter or a run folder.")
    session.name = BASE


def _adapter(session: Session, name: str) -> None:
    if not name and session.name != BASE:
        out().print("adapters: " + (", ".join(session.adapters) or "none"), markup=False)
        return
    name = name or (session.adapters[0] if session.adapters else "")
    if name not in session.adapters:
        raise RecipeError(f'There is no adapter "{name}".', nearest(name, session.adapters))
    session.name = name


def _compare(session: Session, text: str) -> None:
    if not text:
        raise RecipeError("There is nothing to compare.", "Write /compare TEXT.")
    chosen = [BASE, *session.adapters] if session.adapters else [None]
    for name in chosen:
        sys.stdout.write(f"{'base' if name == BASE else name or 'model'}: ")
        session.say(text, name, remember=False)


def _system(session: Session, text: str) -> None:
    session.system = text
    _reset(session, "")


def _temperature(session: Session, text: str) -> None:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise RecipeError(
            f'"{text}" is no temperature.', "Write a number such as 0.7; 0 is greedy."
        )
    session.temperature = value


def _reset(session: Session, _: str) -> None:
    session.history.clear()
    note("The conversation is forgotten.")


def _answerer(
    model: Any, tokenizer: Any, settings: dict[str, Any]
) -> Callable[[Any, str | None, float], Iterator[str]]:
    from reftune.inference.stream import stream

    def answer(prompt: Any, name: str | None, temperature: float) -> Iterator[str]:
        return stream(
            model, tokenizer, prompt, temperature=temperature, adapter_name=name, **settings
        )

    return answer


def _load_more(model: Any, texts: list[str]) -> list[str]:
    """Load further adapters onto the model; return the names of all."""
    from reftune.model.checkpoint import resolve_folder

    names = list(getattr(model, "peft_config", {}))
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or not name.isidentifier():
            raise RecipeError(f'"{text}" is no adapter.', "Write --adapter NAME=PATH.")
        if not names:
            raise RecipeError(
                "More adapters need a first one.", "Start the chat with an adapter or run folder."
            )
        if name in names:
            raise RecipeError(f'The adapter "{name}" is there twice.', "Choose another name.")
        model.load_adapter(str(resolve_folder(path)), adapter_name=name)
        names.append(name)
    return names


def _read_line(prompt: str) -> str:
    """Read a line with editing and history where the terminal can."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return input(prompt)
