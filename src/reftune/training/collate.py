"""Token rows to padded tensors, and the order in which rows are visited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int, Real
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from reftune.errors import DataError
from reftune.training.encode import IGNORE, Encoded, blank
from reftune.training.guides import collate_guides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.model.run import Prepared


class Collator:
    """Pad rows on the right and stack them.

    The attention mask comes from the lengths, never from `ids != pad`, because many tokenizers pad
    with EOS. Columns that no row has (`select`, `intervention_mask`, ...) are left out.

    Args:
        pad_id: Token in padded places; nothing reads it.
        multiple_of: Round lengths up to a multiple of this.
    """

    def __init__(self, pad_id: int = 0, multiple_of: int = 8) -> None:
        self.pad_id, self.multiple_of = pad_id, multiple_of

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, multiple_of: int = 8) -> Collator:
        """Pad with the tokenizer's pad token, else with its EOS, else with 0."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(i for i in ids if i is not None), multiple_of)

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return a batch of B rows padded to T tokens.

        Returns:
            `input_ids`, `attention_mask` `[B, T]` long; `labels`: `[B, T]` long with −100 where
            nothing is learned, or classes `[B]`, or decoder targets `[B, U]`; `prompt_lens` `[B]`;
            and where rows have them `intervention_mask` `[B, T]` bool, `select` (list of B tuples
            or None), `subject_positions` `[B]`, `token_type_ids` `[B, T]`, `weights` `[B, T]`
            float, and `guides`: for each name a batch of the rows that have it, with `rows`.

        Raises:
            DataError: If the batch is empty, or only some rows have a class or a subject.
        """
        if not rows:
            raise DataError("A batch has no rows.", "Check the data.")
        width = self._width(len(row) for row in rows)
        batch: dict[str, Any] = {
            "input_ids": _stack([row.input_ids for row in rows], width, self.pad_id),
            "attention_mask": _stack([[1] * len(row) for row in rows], width, 0),
            "labels": self._labels(rows, width),
            "prompt_lens": torch.tensor([row.prompt_len for row in rows]),
        }
        if any(row.intervention_mask is not None for row in rows):
            masks = [row.intervention_mask or [False] * len(row) for row in rows]
            batch["intervention_mask"] = _stack(masks, width, 0).bool()
        if any(row.select is not None for row in rows):
            batch["select"] = [row.select for row in rows]
        if any(row.subject is not None for row in rows):
            batch["subject_positions"] = _column(rows, "subject")
        if any(row.token_types is not None for row in rows):
            batch["token_type_ids"] = _stack([row.token_types or [] for row in rows], width, 0)
        if any(row.weights is not None for row in rows):
            weights = torch.zeros(len(rows), width)
            for i, row in enumerate(rows):
                weights[i, : len(row)] = torch.tensor(row.weights or [0.0] * len(row))
            batch["weights"] = weights
        if any(row.guides for row in rows):
            batch["guides"] = collate_guides(rows, self, torch.tensor)
        return batch

    def _labels(
        self, rows: Sequence[Encoded], width: int
    ) -> Int[Tensor, "batch targets"] | Real[Tensor, " batch"]:
        if any(row.class_label is not None for row in rows):
            return _column(rows, "class_label")
        if any(row.decoder_labels is not None for row in rows):
            targets = [row.decoder_labels or [IGNORE] for row in rows]
            return _stack(targets, self._width(map(len, targets)), IGNORE)
        return _stack([row.labels for row in rows], width, IGNORE)

    def _width(self, lengths: Any) -> int:
        return -(-max(lengths) // self.multiple_of) * self.multiple_of


def prepare(batch: dict[str, Any]) -> Prepared:
    """Turn a collated batch into what objectives and runners take."""
    from reftune.model.run import Prepared

    fields = ("input_ids", "attention_mask", "labels", "intervention_mask", "select")
    fields += ("prompt_lens", "subject_positions", "weights", "rows")
    guides = {name: prepare(part) for name, part in batch.get("guides", {}).items()}
    return Prepared(
        **{key: value for key, value in batch.items() if key in fields},
        guides=guides,
        extra={k: v for k, v in batch.items() if k not in (*fields, "guides")},
    )


def count_tokens(batch: dict[str, Any]) -> Int[Tensor, ""]:
    """Return the real tokens of a batch, those of blank rows left out."""
    labels = batch["labels"]
    known = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE
    rows = known.reshape(len(labels), -1).any(1)
    return (batch["attention_mask"] * rows[:, None]).sum()


class Padded(Dataset):
    """Rows, followed by any number of blank rows without labels.

    Args:
        rows: A sequence of encoded rows.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index] if index < len(self.rows) else blank(self.rows[0])


class Order(Sampler[int]):
    """The order of rows: a permutation by seed and epoch, whatever the number of processes.

    Where rows do not divide evenly among processes, indices past the end follow; `Padded` answers
    them with blank rows, so that nothing is seen twice and loss and trajectory stay those of one
    process.

    Args:
        num_rows: Rows of the data.
        multiple_of: Rows that all processes together take in one go.
        seed: Seed of the permutations; None keeps the given order.
        epoch: Function that tells the current epoch when iteration starts.
    """

    def __init__(
        self,
        num_rows: int,
        multiple_of: int = 1,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.num_rows, self.seed, self.epoch = num_rows, seed, epoch
        self.total = -(-num_rows // multiple_of) * multiple_of

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            yield from range(self.num_rows)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
            yield from torch.randperm(self.num_rows, generator=generator).tolist()
        yield from range(self.num_rows, self.total)


def _stack(rows: Sequence[Sequence[int]], width: int, fill: int) -> Int[Tensor, "batch {width}"]:
    out = torch.full((len(rows), width), fill, dtype=torch.long)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out


def _column(rows: Sequence[Encoded], name: str) -> Real[Tensor, " batch"]:
    """Return one number a row; floats if any row has a fractional one."""
    values = [getattr(row, name) for row in rows]
    if None in values:
        row, what = rows[values.index(None)], name.replace("_", " ")
        raise DataError(f'Row "{row.id}" has no {what}, others have.', "Fill it in.")
    is_float = any(isinstance(value, float) for value in values)
    return torch.tensor(values, dtype=torch.float32 if is_float else torch.long)
