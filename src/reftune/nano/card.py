"""The card of an embedded model: how it was made, and every gate, held or missed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

HEAD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [text-generation, synthetic, reftune]
---

# {name}

A small {kind} model of an invented world: {parameters:.2f} M parameters, {tokens:.1f} M tokens of
generated text, nothing else. It exists so that experiments on fine-tuning of representations can be
run and checked on one CPU core without a download. It knows sums, 200 people and 40 towns that do
not exist, short passages, and the logs of two machines that were never built. It knows nothing of
the real world and is of no use outside experiments.

```python
import reftune.nano

model, tokenizer = reftune.nano.load("{name}")
prompt = tokenizer("Question: What is 47 + 38? Answer:", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0], skip_special_tokens=True))
```

`python -m reftune.nano train` and `release` make such weights again from code alone: seed {seed},
peak rate {rate:g}, {step_tokens} tokens a step, AdamW, decay over the last {decay:.1f} M tokens.
`train --weights {name}` goes on from these.
"""

GATES_HEAD = """
## Gates

Measured on these weights{quick}: greedy, natively (`Question: ... Answer:`), on items of the test
split, with a 95 % interval. Starred gates are those without which no experiment says anything.
A bar that is missed stays in the table.

| | gate | value | 95 % interval | n | bar | holds |
|---|---|---|---|---|---|---|
"""


def gate_line(row: dict[str, Any]) -> str:
    """Return one line of the table.

    >>> gate_line(dict(name="a", value=0.5, low=0.4, high=0.6, n=9, bar=None, starred=False,
    ...                holds=None))
    '| | a | 0.500 | 0.400 to 0.600 | 9 |  |  |'
    """
    star = "*" if row["starred"] else ""
    holds = {True: "yes", False: "**no**", None: ""}[row["holds"]]
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    return (
        f"| {star + ' ' if star else ''}| {row['name']} | {row['value']:.3f} | {interval} "
        f"| {row['n']} | {row['bar'] or ''} | {holds} |"
    )


def digests(n: int = 1000) -> dict[str, str]:
    """Return a digest of each evaluation set, so that a changed generator is noticed.

    Args:
        n: Items of each set.
    """
    from reftune.nano.gates import DRAWS, GROUPS, draw_items

    groups = tuple(f"{group} families" for group in GROUPS)
    others = ("fact recall, shown phrasings", "fact recall, withheld phrasings", "one hop")
    out = {}
    for name in (*DRAWS, *groups, *others):
        rows = [[item.question, item.answer, item.gold] for item in draw_items(name, n)]
        out[name] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return out


def card(name: str, folder: Path) -> str:
    """Return the card as Markdown, from the files beside the weights.

    `training.json` and `gates.json` are written by the commands, `notes.md` by hand.
    """
    record = json.loads((folder / "training.json").read_text())
    settings, tokens = record["settings"], record["tokens"]
    kinds = {"nano": "Llama", "nano-gpt2": "GPT-2", "nano-encoder": "RoBERTa (masked)"}
    text = HEAD.format(
        name=name,
        kind=kinds.get(name, "language"),
        parameters=record["parameters"] / 1e6,
        tokens=tokens / 1e6,
        seed=settings["seed"],
        rate=settings["rate"],
        step_tokens=settings["step_tokens"],
        decay=(tokens - (settings["decay_start"] or tokens)) / 1e6,
    )
    gates_file = folder / "gates.json"
    if gates_file.is_file():
        measured = json.loads(gates_file.read_text())
        quick = " (quick run: few items)" if measured.get("quick") else ""
        text += GATES_HEAD.format(quick=quick)
        text += "\n".join(gate_line(row) for row in measured["gates"]) + "\n"
        text += "\n## Evaluation sets\n\nFirst 1,000 items of each, sha256, first 16 digits.\n\n"
        text += "\n".join(f"- {key}: `{value}`" for key, value in digests().items()) + "\n"
    notes = folder / "notes.md"
    if notes.is_file():
        text += "\n## What falls short, and what was tried\n\n" + notes.read_text().strip() + "\n"
    total = sum(record["tokens_per_world"].values())
    text += "\n## Training text\n\n"
    text += "\n".join(
        f"- {world}: {count / 1e6:.2f} M tokens ({count / total:.0%})"
        for world, count in record["tokens_per_world"].items()
    )
    return text + "\n"
