"""Models by any name: base models, adapters, stacks, trained models and run folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from reftune.cli.common import run_recipe
from reftune.errors import AdapterError, RecipeError, ReftuneError, nearest

if TYPE_CHECKING:
    from reftune.config.recipe import ModelSpec

HeadOption = Annotated[
    str | None,
    typer.Option(
        "--head", help="causal, classification or seq2seq. Default: what the model says itself."
    ),
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        "--base-model", help="Base model of an adapter. Default: the one it was trained on."
    ),
]


def load_any(
    what: str,
    num_labels: int | None = None,
    head: str | None = None,
    base_model: str | None = None,
) -> Any:
    """Load a base model, an adapter, a stack, a trained model or a run folder.

    Args:
        what: `nano`, a folder or a hub name.
        num_labels: Classes of a classification head, where the task has them.
        head: Which head to load; default is the run's, the adapter's or the checkpoint's own.
        base_model: Load an adapter onto this model instead of its own.

    Returns:
        (model, tokenizer)

    Raises:
        ModelError, AdapterError: If it cannot be found or loaded, or was trained with another head.
        RecipeError: If there is no such head.
    """
    from reftune.config.recipe import ModelSpec
    from reftune.model.artefact import describe, resolve_folder, trained_head
    from reftune.model.build import load_base, locate
    from reftune.model.checkpoint import load_adapter

    check_head(head)
    if not is_adapter(what):
        locate(ModelSpec(what))  # a folder that is no model says so, before libraries guess
    recipe = run_recipe(what)
    spec = recipe.model if recipe else ModelSpec()
    if not is_adapter(what):
        if base_model:
            raise RecipeError(f'"{what}" is no adapter.', "Leave --base-model out.")
        spec = replace(spec, name=what)
        head = "classification" if num_labels is not None else head or head_of(spec)
        return load_base(replace(spec, head=head), num_labels)
    facts, trained = describe(what), trained_head(what)
    if base_model and facts["kind"] == "model":
        raise RecipeError(f'"{what}" is no adapter.', "Leave --base-model out.")
    wanted = head or ("classification" if num_labels is not None else trained or spec.head)
    _check_trained(what, trained, wanted, is_flag=head is not None)
    if facts["kind"] == "model":  # whose config tells the number of its classes
        spec = replace(spec, name=str(resolve_folder(what).resolve()), revision=None)
        return load_base(replace(spec, head=head or trained or head_of(spec)))
    base = base_model or (recipe.model.name if recipe else facts.get("base"))
    if base_model:
        spec = replace(spec, revision=None)
    knows_itself = (
        head is None
        and not base_model
        and (recipe is None or (wanted == "classification" and num_labels is None))
    )
    if not base:
        raise AdapterError(
            f'"{what}" does not say which base model it needs.', "Add --base-model MODEL."
        )
    if knows_itself:
        try:
            return load_adapter(what)
        except AdapterError as error:
            raise AdapterError(
                error.what, error.remedy.replace("Pass model=.", "Add --base-model MODEL.")
            ) from error
    model, tokenizer = load_base(replace(spec, name=base, head=wanted), num_labels)
    if recipe and recipe.model.adapter and facts["kind"] != "stack":  # a stack holds it
        model, _ = load_adapter(recipe.model.adapter, model)
    try:
        return load_adapter(what, model, tokenizer=tokenizer)
    except AttributeError as error:
        raise AdapterError(
            f'"{what}" cannot be put on a model with head {wanted}.', "Leave --head out."
        ) from error


def _check_trained(what: str, trained: str | None, wanted: str, is_flag: bool) -> None:
    """Refuse a head that an artefact was not trained with: its weights would be drawn at random.

    Args:
        what: Name of the artefact.
        trained: The head it was trained with, if that is known.
        wanted: The head it is to be loaded with.
        is_flag: Whether that was said by `--head`; else the task wants it.

    Raises:
        AdapterError: If they differ.
    """
    if trained in (None, wanted):
        return
    model = "the run" if run_recipe(what) else "it"
    remedy = "Leave --head out." if is_flag else f"Train {model} with model.head: {wanted}."
    raise AdapterError(
        f'"{what}" was trained with head {trained}; with head {wanted} '
        f"{'as --head says' if is_flag else 'as this task asks'} the head would be untrained.",
        remedy,
    )


def check_there(what: str) -> None:
    """Refuse, without loading anything large, what `load_any` could not load.

    Raises:
        ModelError, AdapterError: If it is not there, or is something else.
    """
    from reftune.config.recipe import ModelSpec
    from reftune.model.artefact import describe
    from reftune.model.build import locate

    if is_adapter(what):
        describe(what)
        return
    locate(ModelSpec(what))


def has_adapter(what: str) -> bool:
    """Return whether a name is something with an adapter that can be switched off."""
    from reftune.model.artefact import describe

    return is_adapter(what) and describe(what)["kind"] != "model"


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Raise RecipeError unless temperature and top_p, where given, can be sampled with."""
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise RecipeError(
            f"--temperature is {temperature}.", "Give a number such as 0.7; 0 is greedy."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise RecipeError(f"--top-p is {top_p:g}.", "Give a share above 0, up to 1.")


def check_head(head: str | None) -> None:
    """Raise RecipeError unless the head is None or a known one."""
    from reftune.config.recipe import ModelSpec

    known = get_args(get_type_hints(ModelSpec)["head"])
    if head is not None and head not in known:
        raise RecipeError(f'There is no head "{head}".', nearest(head, known))


def head_of(spec: ModelSpec) -> str:
    """Return the head a base model's own config asks for: `causal` unless it says otherwise."""
    from reftune import nano

    if spec.name in nano.NAMES:
        return "causal"
    from transformers import AutoConfig

    from reftune.model.build import locate

    try:
        config = AutoConfig.from_pretrained(
            locate(spec), revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ReftuneError):
        return "causal"  # loading says what is wrong
    names = getattr(config, "architectures", None) or ()
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "classification"
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"


def context_of(spec: ModelSpec) -> int | None:
    """Return how many tokens a base model can see, by its config alone; None if it sets no limit.

    None too where there is no config to be found: loading the model will say what is wrong.
    """
    from types import SimpleNamespace

    from transformers import AutoConfig

    from reftune.inference.prompts import context_len
    from reftune.model.build import locate

    try:
        config = AutoConfig.from_pretrained(
            locate(spec),
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ReftuneError):
        return None
    return context_len(SimpleNamespace(config=config))


def is_adapter(what: str) -> bool:
    """Return whether a name is something trained rather than a plain base model."""
    folder = Path(what).expanduser()
    files = ("adapter_config.json", "stack.json")
    if folder.is_dir():
        inner = [folder, folder / "adapter", folder / "stack", folder / "model"]
        trained = any((place / file).is_file() for place in inner for file in files)
        return trained or (folder / "model" / "config.json").is_file()
    if "/" not in what or folder.parent.is_dir():
        return False
    from transformers.utils import find_adapter_config_file

    from reftune.model.hub import check_reachable

    check_reachable(what)
    try:
        return find_adapter_config_file(what) is not None
    except OSError:
        return False


def load_tokenizer(spec: ModelSpec) -> Any:
    """Load only the tokenizer of a base model.

    Raises:
        ModelError: If it cannot be found or loaded.
    """
    from transformers import AutoTokenizer

    from reftune.errors import ModelError
    from reftune.model.build import locate
    from reftune.model.places import REMEDY, said

    folder = Path(spec.name).expanduser()
    place = str(folder) if (folder / "tokenizer_config.json").is_file() else locate(spec)
    try:
        return AutoTokenizer.from_pretrained(
            place, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f'The tokenizer of "{spec.name}" could not be loaded: {said(error)}', REMEDY
        ) from error


def load_more(model: Any, name: str, path: str) -> None:
    """Load one more adapter onto a model with adapters.

    Args:
        model: A model with an adapter.
        name: The new adapter's name.
        path: Its folder, run folder or hub name.

    Raises:
        AdapterError: If it is no adapter of the kind that is there, or does not fit the model.
    """
    from reftune.model.artefact import describe, resolve_folder
    from reftune.model.levels import kind_of
    from reftune.model.places import said

    kind = str(describe(path)["kind"])
    kind, mine = {"reftune": "reft"}.get(kind, kind), kind_of(model)
    if kind != mine:
        words = {"model": "no adapter", "stack": "a stack of adapters"}
        given = words.get(kind, f"an adapter of kind {kind}")
        raise AdapterError(
            f'"{path}" is {given}; beside the first adapter only others of its kind, {mine}, can '
            "be loaded.",
            "Start with it instead, or give another adapter.",
        )
    try:
        model.load_adapter(str(resolve_folder(path)), adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"The adapter in {path} does not fit the model: {said(error)}",
            "Give one that was trained on the same base model.",
        ) from error


def trained_form(what: str) -> tuple[str, str] | None:
    """Return task and prompt form (with `{prompt}`) of a run whose task asks in plain text."""
    from reftune import tasks

    recipe = run_recipe(what)
    if recipe is None:
        return None
    try:
        form = tasks.get(recipe.task).prompt_form
    except ReftuneError:  # a task that is not installed here
        return None
    return (recipe.task.name, form) if form else None


def shape(form: str, text: str) -> str:
    """Put a text into a prompt form, unless it has that form already.

    >>> shape("Question: {prompt} Answer:", "1+1?")
    'Question: 1+1? Answer:'
    >>> shape("Question: {prompt} Answer:", "Question: 1+1? Answer:")
    'Question: 1+1? Answer:'
    """
    before, _, after = form.partition("{prompt}")
    is_whole = text.startswith(before) and text.rstrip().endswith(after.rstrip())
    return text if is_whole and (before or after) else form.replace("{prompt}", text)
