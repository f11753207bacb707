"""Rows of several documents that do not see each other, as tensors for the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftune.nano.mix import Document
from reftune.nano.tokenizer import PAD_ID

ROWS: tuple[int, ...] = (128, 256, 512, 1024)
"""Row lengths. A document goes to the shortest that holds it: on a CPU attention over rows of 128
is a third cheaper than over 256, and most documents are shorter than 100 tokens."""

MICRO_TOKENS = 2048
"""Tokens a forward pass takes: larger passes fall out of the second-level cache."""

SCORED = 0.25
"""Share of question tokens that are scored, each with its weight / SCORED: same expectation of the
loss, a third less work in the vocabulary layer."""


@dataclass
class Batch:
    """One forward pass.

    Attributes:
        ids: Token ids.
        position_ids: Place of each token in its own document.
        documents: Number of the document in its row, -1 for padding.
        scored: Flat places whose next token is scored.
        targets: Those next tokens.
        weights: Their loss weights.
        worlds: Number of their sub-world.
        causal: Whether a token sees only what stands before it.
    """

    ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    documents: Int[Tensor, "rows length"]
    scored: Int[Tensor, " scored"]
    targets: Int[Tensor, " scored"]
    weights: Float[Tensor, " scored"]
    worlds: Int[Tensor, " scored"]
    causal: bool = True

    def mask(self) -> Bool[Tensor, "rows 1 length length"]:
        """Return the attention mask, True = may look."""
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (same.tril_() if self.causal else same)[:, None]


def fill_rows(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Distribute documents to rows of `row` tokens: longest first, first row with room.

    >>> fill_rows([60, 100, 30, 20], 128)
    [[1, 3], [0, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for place, free in enumerate(room):
            if lengths[index] <= free:
                rows[place].append(index)
                room[place] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(row - lengths[index])
    return rows


def pack(
    documents: Sequence[Document], worlds: Sequence[str], generator: torch.Generator
) -> list[Batch]:
    """Pack the documents of one optimiser step into forward passes.

    Args:
        documents: All at most `ROWS[-1]` tokens; longer ones are cut there.
        worlds: Names whose places number the sub-worlds in `Batch.worlds`.
        generator: Decides which question tokens are scored.
    """
    classes: dict[int, list[Document]] = {row: [] for row in ROWS}
    for document in documents:
        fit = next((row for row in ROWS if len(document.ids) <= row), ROWS[-1])
        classes[fit].append(document)
    batches = []
    for row, members in classes.items():
        rows = fill_rows([min(len(document.ids), row) for document in members], row)
        number = max(1, MICRO_TOKENS // row)
        for start in range(0, len(rows), number):
            chosen = [[members[i] for i in line] for line in rows[start : start + number]]
            batches.append(_tensors(chosen, row, worlds, generator))
    return batches


def _tensors(
    rows: list[list[Document]], row: int, worlds: Sequence[str], generator: torch.Generator
) -> Batch:
    """Lay rows of documents out as one `Batch`, cut to the longest row."""
    ids, positions, owners, weights, kinds = [], [], [], [], []
    width = min(row, max(sum(len(document.ids) for document in line) for line in rows))
    for line in rows:
        flat: list[list] = [[], [], [], [], []]
        for number, document in enumerate(line):
            size = min(len(document.ids), width)
            flat[0] += document.ids[:size]
            flat[1] += range(size)
            flat[2] += [number] * size
            # The weight of a place is that of its *next* token; a document's last has none.
            flat[3] += [*document.weights[1:size], 0.0]
            flat[4] += [worlds.index(document.world)] * size
        gap = width - len(flat[0])
        for part, value in zip(flat, (PAD_ID, 0, -1, 0.0, 0), strict=True):
            part += [value] * gap
        for out, part in zip((ids, positions, owners, weights, kinds), flat, strict=True):
            out.append(part)
    tokens = torch.tensor(ids)
    weight = torch.tensor(weights).flatten()
    lottery = torch.rand(weight.shape, generator=generator) < SCORED
    weight = torch.where(weight < 1, weight * lottery / SCORED, weight)
    scored = weight.nonzero()[:, 0]
    following = tokens.flatten().roll(-1)
    return Batch(
        ids=tokens,
        position_ids=torch.tensor(positions),
        documents=torch.tensor(owners),
        scored=scored,
        targets=following[scored],
        weights=weight[scored],
        worlds=torch.tensor(kinds).flatten()[scored],
    )
