"""Number encoding: can the numbers of a question be read from hidden states, and still after edits?

For each layer a ridge probe predicts log2 of an operand, from the state of the operand's own last
token and from the state of the last prompt token:

    log2 v ≈ w·h_l(t) + c,   h_l(t) = output of block l at token t, with the edits that act there.

Three probes say three things: of the base on base states (is the number there?), of the adapter on
adapter states (is it still there?), and the base's probe on adapter states, moved to their mean (is
it still where the base reads it? An offset that is the same for all numbers does no harm). BREP
(Liang et al. 2025) finds that representation edits perturb the encoding of numbers in two-operand
additions. The same rows serve all three.

Left out on purpose: probes that are not linear, and other values than the operands'. A value may
occur in training and in held-out rows; what is compared are models, on the same rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from reftune.errors import DataError
from reftune.inference import stats
from reftune.inference.continuing import WRITERS, Start, Writer, writing
from reftune.inference.edits import row_edits
from reftune.inference.predictions import prompt_of
from reftune.inference.stats import PairedTest
from reftune.inference.steps import numbers
from reftune.inference.study import Study

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from reftune.report.model import Figure

Source = Literal["additions", "task"]
Operand = Literal["first", "second"]
Place = Literal["own", "last"]
OPERANDS: tuple[Operand, ...] = ("first", "second")
PLACES: tuple[Place, ...] = ("own", "last")
"""The state of the operand's own last token, and of the last prompt token."""
READINGS = ("base", "adapter", "base_on_adapter")
"""Probe of the base, of the adapter, and the base's probe on states of the adapter."""
ROWS = 512
"""Prompts that are probed."""
LEAST = 24
"""Fewest prompts a probe can be fitted and tried on."""
HELD_OUT, KEPT_BACK = 1 / 3, 1 / 5
"""Share of the prompts that probes are tried on, and share of the others that chooses λ."""
_RESAMPLES = 300


@dataclass(frozen=True)
class ProbePrompt:
    """A prompt with two numbers.

    Attributes:
        start: Its tokens.
        values: The numbers.
        places: Places of the last token of each number, then of the last prompt token.
    """

    start: Start
    values: tuple[float, float]
    places: tuple[int, int, int]


@dataclass(frozen=True)
class Probe:
    """How well one number can be read at one place of one layer, on held-out prompts.

    Attributes:
        layer: Index of the block whose output is read.
        operand: Which number.
        place: Where: at its `own` last token, or at the `last` prompt token.
        r2: R² of each of `READINGS`.
        error: Mean absolute error in log2 of each of `READINGS`.
        tests: Absolute error of `adapter` and of `base_on_adapter`, each minus that of `base`.
        penalties: λ of the base's and of the adapter's probe.
    """

    layer: int
    operand: Operand
    place: Place
    r2: dict[str, Figure]
    error: dict[str, Figure]
    tests: dict[str, PairedTest]
    penalties: dict[str, float]


@dataclass(frozen=True)
class NumberEncoding:
    """What linear probes read of the numbers of a question.

    Attributes:
        source: Where the prompts come from: `additions` or `task`.
        layers: Blocks of the model.
        fitted: Prompts the probes are fitted on, those that choose λ included.
        held_out: Prompts they are tried on.
        probes: One for each layer, operand and place.
    """

    source: Source
    layers: int
    fitted: int
    held_out: int
    probes: list[Probe]

    def at(self, operand: Operand, place: Place) -> list[Probe]:
        """Return the probes of an operand at a place, by layer."""
        return [p for p in self.probes if (p.operand, p.place) == (operand, place)]


def number_encoding(study: Study, source: Source = "additions", rows: int = ROWS) -> NumberEncoding:
    """Probe every layer for the two operands of questions, with and without the adapter.

    Args:
        study: Model, task and rows.
        source: `additions` asks "What is 47 + 38?" in the prompt form of the task; `task` takes the
            first two numbers of the task's own questions.
        rows: Most prompts.

    Raises:
        DataError: If there are too few prompts with two positive numbers.
    """
    import torch

    prompts = probe_prompts(study, source, rows)
    states = {who: _states_of(study, who, prompts) for who in WRITERS}
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(study.seed))
    cut = round(len(prompts) * HELD_OUT)
    held, fitted = order[:cut], order[cut:]
    probes = []
    with study.bar("probes") as report:
        layers = len(states["base"])
        for layer in range(layers):
            for number, operand in enumerate(OPERANDS):
                y = torch.tensor([math.log2(p.values[number]) for p in prompts]).double()
                for place in PLACES:
                    column = number if place == "own" else 2
                    x = {who: states[who][layer, column] for who in WRITERS}
                    where = (layer, operand, place)
                    probes.append(_probe(study, where, x, y, fitted, held))
            if report is not None:
                report(layer + 1, layers)
    return NumberEncoding(source, layers, len(fitted), len(held), probes)


def _probe(
    study: Study,
    where: tuple[int, Operand, Place],
    x: dict[Writer, Float[Tensor, "rows dim"]],
    y: Float[Tensor, " rows"],
    fitted: Int[Tensor, " fitted"],
    held: Int[Tensor, " held"],
) -> Probe:
    """Fit the probes of base and adapter at one place, and try them on held-out rows."""
    import torch

    from reftune.inference.ridge import fit_chosen

    kept_back = torch.arange(round(len(fitted) * KEPT_BACK))  # the rows are shuffled already
    lines = {who: fit_chosen(x[who][fitted], y[fitted], kept_back) for who in WRITERS}
    moved = replace(lines["base"], centre=x["adapter"][fitted].double().mean(0))
    true = y[held]
    read = {
        "base": lines["base"].predict(x["base"][held]),
        "adapter": lines["adapter"].predict(x["adapter"][held]),
        "base_on_adapter": moved.predict(x["adapter"][held]),
    }
    errors = {name: (values - true).abs().tolist() for name, values in read.items()}
    others = READINGS[1:]
    level, seed = study.level, study.seed
    return Probe(
        *where,
        {name: _r2_figure(study, true, read[name]) for name in READINGS},
        {name: _error_figure(study, errors[name]) for name in READINGS},
        {
            name: stats.paired_bootstrap(errors[name], errors["base"], level=level, seed=seed)
            for name in others
        },
        {who: line.penalty for who, line in lines.items()},
    )


def _r2_figure(
    study: Study, y: Float[Tensor, " rows"], predicted: Float[Tensor, " rows"]
) -> Figure:
    """Return R² with a bootstrap interval over rows; an open figure where y does not vary."""
    from reftune.inference.ridge import r_squared
    from reftune.report.model import Figure

    true, read = y.numpy(), predicted.numpy()
    value = r_squared(true, read)
    if not math.isfinite(value):
        return Figure(mean=None, n=len(y), unit="")

    def again(rows: list[int]) -> float:
        return r_squared(true[rows], read[rows])

    rows = list(range(len(y)))
    low, high = stats.bootstrap(rows, again, study.level, _RESAMPLES, study.seed)
    return Figure(mean=value, n=len(y), low=low, high=high, unit="")


def _error_figure(study: Study, errors: list[float]) -> Figure:
    from reftune.report.model import Figure

    low, high = stats.bootstrap(errors, level=study.level, seed=study.seed)
    mean = math.fsum(errors) / len(errors)
    return Figure(mean=mean, n=len(errors), low=low, high=high, unit="log2")


def additions(
    count: int, seed: int = 0, lowest: int = 2, highest: int = 99
) -> list[tuple[str, tuple[int, int]]]:
    """Return questions of two-operand additions, no pair twice, with their operands.

    >>> additions(2)
    [('What is 95 + 2?', (95, 2)), ('What is 53 + 2?', (53, 2))]
    """
    rng, pairs = random.Random(f"additions|{seed}"), {}
    width = highest - lowest + 1
    while len(pairs) < min(count, width * width):
        pairs[rng.randint(lowest, highest), rng.randint(lowest, highest)] = None
    return [(f"What is {a} + {b}?", (a, b)) for a, b in pairs]


def probe_prompts(study: Study, source: Source, rows: int = ROWS) -> list[ProbePrompt]:
    """Return prompts with the tokens at which their two numbers end.

    Raises:
        DataError: If fewer than 24 prompts hold two positive numbers and fit into the context.
    """
    from reftune.inference.prompts import context_len, encode_prompts

    if source == "additions":
        questions = [question for question, _ in additions(rows, study.seed)]
        asked = [_as_asked(study, question) for question in questions]
        starts = [Start(row) for row in encode_prompts(study.tokenizer, asked)]
    else:
        questions = [example.question for example in study.examples[:rows]]
        asked = [prompt_of(example) for example in study.examples[:rows]]
        starts = study.starts[:rows]
    limit = context_len(study.model) or math.inf
    found = [
        _located(study.tokenizer, *told) for told in zip(asked, questions, starts, strict=True)
    ]
    usable = [p for p in found if p is not None and len(p.start.ids) <= limit]
    if len(usable) < LEAST:
        raise DataError(
            f"Only {len(usable)} of {len(asked)} prompts hold two numbers above 0; probes need "
            f"{LEAST}.",
            "Take more rows, or probe the numbers of additions.",
        )
    return usable


def _as_asked(study: Study, question: str) -> Any:
    """Return a question in the form in which the task asks."""
    form, first = study.task.prompt_form, study.examples[0]
    if form is not None:
        return form.replace("{prompt}", question)
    if first.messages is None:
        return question
    messages = [dict(message) for message in prompt_of(first)]
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=None)
    if last is None:
        return [*messages, {"role": "user", "content": question}]
    return [*messages[:last], {**messages[last], "content": question}]


def _located(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, question: str, start: Start
) -> ProbePrompt | None:
    """Return a prompt with its first two numbers above 0; None if it has fewer, or was cut."""
    from reftune.tasks.texts import frame, marked_tokens, render

    if isinstance(prompt, str):
        text, lead = prompt, len(frame(tokenizer).lead)
    else:
        text, lead = render(tokenizer, [dict(m) for m in prompt], "probed", True), 0
    begin = text.rfind(question)
    begin, end = (begin, begin + len(question)) if question and begin >= 0 else (0, len(text))
    inside = [n for n in numbers(text) if begin <= n.start and n.end <= end and n.value > 0]
    if len(inside) < len(OPERANDS) or start.prompt.cut:
        return None
    spans = [(n.start, n.end) for n in inside[: len(OPERANDS)]]
    marks = [marked_tokens(tokenizer, text, [span], "A prompt") for span in spans]
    first, second = (lead + max(i for i, marked in enumerate(mark) if marked) for mark in marks)
    values = float(inside[0].value), float(inside[1].value)
    return ProbePrompt(start, values, (first, second, len(start.ids) - 1))


def _states_of(
    study: Study, who: Writer, prompts: Sequence[ProbePrompt]
) -> Float[Tensor, "layers places rows dim"]:
    with writing(study.model, who) as model, study.bar(f"states of the {who}") as report:
        size = study.spec.batch_size
        return read_states(model, study.tokenizer, prompts, size, report)


def read_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[ProbePrompt],
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "layers places rows dim"]:
    """Return what leaves each block at the places of prompts, edits included, in fp32 on the CPU.

    Args:
        model: A causal language model; its active adapters act.
        tokenizer: Its tokenizer.
        prompts: Prompts and places.
        batch_size: Prompts of a forward pass.
        progress: Called with (prompts done, prompts in all).
    """
    import torch

    from reftune.inference import prompts as rows_of
    from reftune.model import prompt_scope
    from reftune.model.lookup import blocks_of

    blocks = blocks_of(model).modules
    parts = []
    with rows_of.evaluating(model):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            # Padding stands behind the prompts, so places are columns.
            pad_id, device = rows_of.pad_id(tokenizer), rows_of.device_of(model)
            padded = rows_of.pad([p.start.ids for p in batch], pad_id, device, side="right")
            lens = torch.tensor([len(p.start.ids) for p in batch], device=device)
            inputs: dict[str, Any] = {
                "input_ids": padded.input_ids,
                "attention_mask": padded.attention_mask,
                "use_cache": False,
            }
            if rows_of.accepts(model, "logits_to_keep"):
                inputs["logits_to_keep"] = 1
            extra = row_edits(model, [p.start for p in batch], padded.attention_mask)
            with _Catcher(blocks, torch.tensor([p.places for p in batch])) as catcher:
                with prompt_scope(model, lens, **extra):
                    model(**inputs)
                parts.append(catcher.states())
            if progress is not None:
                progress(start + len(batch), len(prompts))
    return torch.cat(parts, dim=2)


class _Catcher:
    """For one forward pass, keep what blocks return at some columns of each row.

    Its hooks run after those that edit, which were there before.
    """

    def __init__(self, blocks: Sequence[nn.Module], places: Int[Tensor, "rows places"]) -> None:
        self.blocks, self.places = blocks, places
        self.caught: list[Float[Tensor, "rows places dim"]] = []

    def __enter__(self) -> _Catcher:
        self.handles = [block.register_forward_hook(self._catch) for block in self.blocks]
        return self

    def _catch(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        import torch

        h = output[0] if isinstance(output, tuple) else output
        places = self.places.to(h.device)
        rows = torch.arange(len(places), device=h.device)[:, None]
        self.caught.append(h[rows, places].float().cpu())

    def states(self) -> Float[Tensor, "layers places rows dim"]:
        """Return what was kept, block by block."""
        import torch

        return torch.stack(self.caught).transpose(1, 2)

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
