"""The gates of the embedded model: what must hold before an experiment on it says anything.

Every figure is greedy on the shipped weights unless said otherwise, at least 1,000 items where the
world has as many (`quick`: 200), with its 95 % interval: Wilson for shares, normal for means. A
gate holds by its point estimate. A bar that is missed stays in the table. Rows without a bar are
there for the reader: they locate a failure.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reftune.intervals import wilson
from reftune.nano import facts, forward, guided, logs, packing, passages, stories, sums
from reftune.nano.answering import answers
from reftune.nano.item import Item
from reftune.nano.logs_systems import SHOWN, SYSTEMS
from reftune.nano.mix import render_batch
from reftune.nano.sums_formats import last_number, strict_answer

log = logging.getLogger(__name__)

IDK = "I do not know."
SAMPLES = 16


@dataclass(frozen=True)
class Bar:
    """What a gate asks for: `low <= value <= high`; None on a side asks nothing."""

    low: float | None = None
    high: float | None = None
    starred: bool = False

    def holds(self, value: float) -> bool:
        """Say whether a value passes."""
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.high is not None else ""


BARS: dict[str, Bar] = {
    "one step, known families": Bar(0.95, starred=True),
    "two steps, known families": Bar(0.90, starred=True),
    "three steps, known families": Bar(0.70, starred=True),
    "new families, last number": Bar(0.15, 0.60, starred=True),
    "half families after warm-up": Bar(0.25, 0.60),
    "half families, pass@16 minus greedy": Bar(0.25),
    "solution shown: copied": Bar(0.95),
    "flaw named: shown": Bar(0.60),
    "fact recall, shown phrasings": Bar(0.95, starred=True),
    "fact recall, withheld phrasings": Bar(0.90, starred=True),
    "one hop with bridge, unshown people": Bar(0.75),
    "I do not know, unknown names": Bar(0.90),
    "I do not know, known names": Bar(None, 0.03),
    "yes/no, kinds 1 and 2": Bar(0.80, starred=True),
    "yes/no, kind 3": Bar(0.55, 0.75, starred=True),
    "yes/no, kind 4": Bar(0.45, 0.60, starred=True),
    "chat minus native, worst sub-world": Bar(-0.03),
    "tokens per log line": Bar(None, 25),
}
"""Bars of the design. They may be missed; they are not lowered to fit."""


@dataclass(frozen=True)
class Gate:
    """One measured figure with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    n: int

    def row(self) -> dict[str, Any]:
        """Return the gate as JSON holds it."""
        bar = BARS.get(self.name)
        return {
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()},
            "bar": str(bar) if bar else None,
            "starred": bool(bar and bar.starred),
            "holds": bar.holds(self.value) if bar else None,
        }


def share(name: str, right: Sequence[bool]) -> Gate:
    """Return a gate whose value is the share of True."""
    hits = sum(map(bool, right))
    return Gate(name, hits / len(right), *wilson(hits, len(right)), len(right))


def mean(name: str, values: Sequence[float]) -> Gate:
    """Return a gate whose value is a mean, with a normal interval."""
    n = len(values)
    value = sum(values) / n
    spread = math.sqrt(sum((v - value) ** 2 for v in values) / max(1, n - 1) / n) * 1.96
    return Gate(name, value, value - spread, value + spread, n)


def is_right(item: Item, text: str) -> bool:
    """Say whether an answer is right, in the native form of the item's sub-world.

    >>> is_right(Item("facts", "pet", (), "?", "rabbit.", "rabbit"), "rabbit.")
    True
    """
    if item.kind == "remark":
        return guided.shows_flaw_item(text, item)
    if item.world == "guided":
        return guided.copies(text, item)
    if item.world == "sums":
        return strict_answer(text, "native") == item.gold
    if item.kind.startswith("one hop") and item.gold:
        return text.endswith(f"The answer is {item.gold}.")
    return text == item.answer


Draw = Callable[[random.Random], Item]


def _known(steps: int, pairs: sums.Pairs = "any") -> Draw:
    return lambda rng: sums.item(sums.problem(rng, "test", "known", steps, pairs=pairs))


def _group(group: Any) -> Draw:
    return lambda rng: sums.item(sums.problem(rng, "test", group))


def _passage(kinds: Sequence[int], form: Any) -> Draw:
    return lambda rng: passages.sample(rng, "test", kind=rng.choice(kinds), form=form)


STEPS = ("one step", "two steps", "three steps")
DRAWS: dict[str, Draw] = {
    **{f"{name}, known families": _known(i + 1) for i, name in enumerate(STEPS)},
    **{f"{name}, unseen pairs": _known(i + 1, "unseen") for i, name in enumerate(STEPS)},
    **{f"{name}, seen pairs": _known(i + 1, "seen") for i, name in enumerate(STEPS)},
    "drills, unseen pairs": lambda rng: sums.drill(rng, "test", "unseen", "question"),
    "solution shown: copied": lambda rng: guided.shown(rng, "test"),
    "flaw named: shown": lambda rng: guided.flawed(rng, "test"),
    "I do not know, unknown names": lambda rng: facts.unknown(rng, "test"),
    "open look-ups, kinds 1 and 2": _passage((1, 2), "open"),
    "yes/no, kinds 1 and 2": _passage((1, 2), "yes_no"),
    "yes/no, kind 3": _passage((3,), "yes_no"),
    "yes/no, kind 4": _passage((4,), "yes_no"),
}
"""Evaluation sets that are plain draws; the name is the gate's."""


GROUPS = ("new", "far", "half")
"""Groups of families with an evaluation set of their own."""


def draw_items(name: str, n: int) -> list[Item]:
    """Return the first `n` items of an evaluation set; the same ones in every process."""
    for group in GROUPS:
        if name.startswith(f"{group} families"):
            rng = random.Random(f"gate-{group}")
            return [_group(group)(rng) for _ in range(n)]
    rng = random.Random(f"gate-{name}")
    if name.startswith("fact recall"):
        kind = "shown" if "shown" in name else "withheld"
        return facts.recall_items(kind, rng, n)
    if name.startswith("one hop"):
        items = [
            facts.one_hop_item(person, relation, phrasing)
            for person in (*facts.edit_subjects("validation"), *facts.edit_subjects("test"))
            for relation in facts.TOWN_RELATIONS
            for phrasing in range(2)
        ]
        rng.shuffle(items)
        return items[:n]
    return [DRAWS[name](rng) for _ in range(n)]


class Measure:
    """Measures gates of one model.

    Args:
        model: Causal model in evaluation mode.
        tokenizer: Its tokenizer.
        n: Items of each evaluation set.
        samples_n: Items of the pass@16 set.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        n: int = 1000,
        samples_n: int = 1000,
    ) -> None:
        self.model, self.tokenizer, self.n, self.samples_n = model, tokenizer, n, samples_n

    def right(self, items: Sequence[Item], chat: bool = False) -> list[bool]:
        """Answer items greedily and say which answers are right."""
        texts = answers(self.model, self.tokenizer, items, chat)
        return [is_right(item, text) for item, text in zip(items, texts, strict=True)]

    def plain(self, name: str) -> Gate:
        """Measure a gate that is the share of right answers on one evaluation set."""
        return share(name, self.right(draw_items(name, self.n)))

    def families(self, name: str) -> Gate:
        """Last-number accuracy on a group of families."""
        items = draw_items(name, self.n)
        texts = answers(self.model, self.tokenizer, items)
        return share(name, [last_number(t) == i.gold for i, t in zip(items, texts, strict=True)])

    def facts(self) -> Iterator[Gate]:
        """Recall, and how often a known name is answered with `I do not know.`"""
        idle: list[bool] = []
        for name in ("fact recall, shown phrasings", "fact recall, withheld phrasings"):
            items = draw_items(name, self.n)
            texts = answers(self.model, self.tokenizer, items, max_new=16)
            yield share(name, [is_right(i, t) for i, t in zip(items, texts, strict=True)])
            idle += [text == IDK for text in texts]
        yield share("I do not know, known names", idle)

    def half(self) -> Iterator[Gate]:
        """Half families after a warm-up on 300 solutions: greedy, pass@16 at temperature 1."""
        rng = random.Random("gate-half")
        shown = [sums.item(sums.problem(rng, "train", "half")) for _ in range(300)]
        items = draw_items("half families after warm-up", self.samples_n)
        yield share("half families before warm-up", self.right(items))
        model = warm_up(self.model, self.tokenizer, shown)
        greedy = [
            is_right(item, text)
            for item, text in zip(items, answers(model, self.tokenizer, items), strict=True)
        ]
        yield share("half families after warm-up", greedy)
        many = [item for item in items for _ in range(SAMPLES)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            texts = answers(model, self.tokenizer, many, temperature=1.0, batch=256)
        hits = [is_right(item, text) for item, text in zip(many, texts, strict=True)]
        found = [any(hits[i : i + SAMPLES]) for i in range(0, len(hits), SAMPLES)]
        yield share("half families, pass@16", found)
        gain = [float(f) - float(g) for f, g in zip(found, greedy, strict=True)]
        yield mean("half families, pass@16 minus greedy", gain)

    def chat(self) -> Iterator[Gate]:
        """Chat form against native form, paired, in each sub-world that has both."""
        sets = {
            "sums": draw_items("two steps, known families", self.n),
            "facts": draw_items("fact recall, shown phrasings", self.n),
            "passages": draw_items("yes/no, kinds 1 and 2", self.n),
            "guided": draw_items("solution shown: copied", self.n),
            "stories": [stories.unknown(random.Random(i), "test") for i in range(self.n)],
        }
        gaps = []
        for world, items in sets.items():
            pairs = zip(self.right(items, chat=True), self.right(items), strict=True)
            gaps.append(mean(f"chat minus native, {world}", [float(c) - n for c, n in pairs]))
        yield from gaps
        worst = min(gaps, key=lambda gate: gate.value)
        yield Gate(
            "chat minus native, worst sub-world", worst.value, worst.low, worst.high, worst.n
        )

    def log_lines(self) -> Iterator[Gate]:
        """Tokens a log line costs, on jobs of the studies."""
        rng = random.Random("gate-logs")
        lengths: dict[str, list[float]] = {}
        for system in SYSTEMS:
            lines = [line for _ in range(self.n // 10) for line in logs.run(rng, system).lines]
            ids = self.tokenizer([line + "\n" for line in lines], add_special_tokens=False)
            lengths[system] = [float(len(row)) for row in ids["input_ids"]]
        yield mean("tokens per log line", [v for row in lengths.values() for v in row])
        unseen = [v for system, row in lengths.items() if system not in SHOWN for v in row]
        yield mean("tokens per log line, unseen systems", unseen)

    def all(self) -> Iterator[Gate]:
        """Measure every gate, in the order of the card."""
        for name in STEPS:
            yield self.plain(f"{name}, known families")
            yield self.plain(f"{name}, seen pairs")
            yield self.plain(f"{name}, unseen pairs")
        yield self.plain("drills, unseen pairs")
        yield self.families("new families, last number")
        yield self.families("far families, last number")
        yield from self.half()
        yield self.plain("solution shown: copied")
        yield self.plain("flaw named: shown")
        yield from self.facts()
        yield self.plain("one hop with bridge, unshown people")
        yield self.plain("I do not know, unknown names")
        yield self.plain("open look-ups, kinds 1 and 2")
        yield self.plain("yes/no, kinds 1 and 2")
        yield self.plain("yes/no, kind 3")
        yield self.plain("yes/no, kind 4")
        yield from self.chat()
        yield from self.log_lines()

    def probe(self) -> Iterator[Gate]:
        """Measure what the go/no-go of a training run looks at."""
        yield self.plain("drills, unseen pairs")
        for name in STEPS:
            yield self.plain(f"{name}, known families")
        yield self.plain("open look-ups, kinds 1 and 2")
        yield self.plain("yes/no, kinds 1 and 2")
        yield from self.facts()
        yield self.plain("solution shown: copied")
        yield self.plain("I do not know, unknown names")


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    epochs: int = 3,
    rate: float = 3e-4,
    batch: int = 25,
) -> PreTrainedModel:
    """Fine-tune a copy of a model on items, all weights, fp32; return it in evaluation mode."""
    with torch.inference_mode(False):
        dtype = model.dtype
        tuned = copy.deepcopy(model).float().train()
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0, fused=True)
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        core = tokenizer.backend_tokenizer
        for _ in range(epochs):
            order = rng.sample(list(items), len(items))
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                documents = render_batch(chosen, [False] * len(chosen), core)
                batches = packing.pack(documents, [items[0].world], generator)
                total = sum(part.weights.sum() for part in batches)
                for part in batches:
                    scores = forward.logits(tuned, part).float()
                    losses = F.cross_entropy(scores, part.targets, reduction="none")
                    ((losses * part.weights).sum() / total).backward()
                torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return tuned.to(dtype).eval()
