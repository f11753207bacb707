"""`reftune chat`: talk to a model, with and without its adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import note, out
from reftune.cli.models import (
    BaseModelOption,
    HeadOption,
    check_sampling,
    load_any,
    load_more,
    shape,
    trained_form,
)
from reftune.errors import RecipeError, ReftuneError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        str | None,
        typer.Option(help='Plain text around each input: "Question: {prompt} Answer:".'),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template", help="The chat template, whatever the run was trained on."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling, above 0 up to 1.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    head: HeadOption = None,
    base_model: BaseModelOption = None,
) -> None:
    """Talk to a model; words appear as they are generated.

    Examples:

        reftune chat runs/demo
        reftune chat runs/demo --adapter other=runs/rank8 --temperature 0.7

    A run whose task asks in plain text is asked in that form. In the chat, `/base` switches the
    adapter off and `/adapter` on again, `/compare TEXT` asks both, `/help` lists the rest.
    """
    if template is not None and "{prompt}" not in template:
        raise RecipeError(f'The template "{template}" has no place.', "Write {prompt} in it.")
    if chat_template and (raw or template is not None):
        raise RecipeError("Plain text and --chat-template are both asked for.", "Choose one.")
    check_sampling(temperature, top_p)
    loaded, tokenizer = load_any(model, None, head, base_model)
    names = _load_more(loaded, adapter or [])
    form = _form(model, tokenizer, raw, template, chat_template)
    settings = {"max_new_tokens": max_new_tokens, "top_p": top_p, "seed": seed}
    session = Session(
        answer=_answerer(loaded, tokenizer, settings),
        adapters=names,
        raw=form is not None,
        template=form or "{prompt}",
        system=system,
        temperature=temperature,
        name=names[0] if names else None,
    )
    note(f"{model}" + (f" with {', '.join(names)}" if names else "") + ". /help lists commands.")
    loop(session, _read_line)


def _form(
    model: str, tokenizer: Any, raw: bool, template: str | None, chat_template: bool
) -> str | None:
    """Return the form in which plain text is asked, or None for the chat template; say which."""
    trained = None if raw or template or chat_template else trained_form(model)
    if trained is not None:
        task, form = trained
        shown = form.replace("{prompt}", "...").strip().replace("\n", " / ")
        how = "as they are" if form == "{prompt}" else f'as "{shown}"'
        note(
            f"Lines are asked {how}, the form of task {task}, each by itself; --chat-template asks "
            "through the chat template."
        )
        return form
    if raw or template is not None:
        return template or "{prompt}"
    if getattr(tokenizer, "chat_template", None):
        note("Lines are asked through the chat template; the conversation is remembered.")
        return None
    note("The tokenizer has no chat template: plain text is continued, without memory.")
    return "{prompt}"


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
            return shape(self.template, text)
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
    from reftune.model.site import BASE

    while True:
        label = "base" if session.name == BASE else session.name or ""
        try:
            line = read(f"{label}> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        except UnicodeDecodeError as error:
            note(f"That line is no UTF-8 text: {error}.")
            continue
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
    from reftune.model.site import BASE

    if not session.adapters:
        raise RecipeError("This is the base model already.", "Give an adapter or a run folder.")
    session.name = BASE


def _adapter(session: Session, name: str) -> None:
    from reftune.model.site import BASE

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
    from reftune.model.site import BASE

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
        load_more(model, name, path)
        names.append(name)
    return names


def _read_line(prompt: str) -> str:
    """Read a line with editing and history where the terminal can."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    return input(prompt)
