"""The store of constants: what causal caching computed once, kept by content.

An entry is found by what it depends on and by nothing else: token ids, the base model's weights and
those of frozen adapters, precision, attention kernel, and where the constants end. A changed
template, base or adapter therefore misses; nothing can be stale. Two kinds of entries: keys and
values of a prefix (rows with equal prompts share one), and the output of block l0 at a suffix.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reftune.errors import TrainingError

log = logging.getLogger(__name__)

Entry = dict[str, Tensor]


class Store:
    """Entries in host memory, up to a number of bytes.

    What does not fit is not kept, and nothing is thrown out for it: epochs visit all rows equally
    often, so that any row is as good as another.

    Args:
        budget: Bytes all entries may take together.
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.nbytes = budget, 0
        self.entries: dict[str, Entry] = {}
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def get(self, key: str) -> Entry | None:
        """Return an entry, or None."""
        found = self.entries.get(key)
        self._count(found)
        return found

    def put(self, key: str, entry: Entry) -> bool:
        """Keep an entry; returns whether there was room."""
        size = sum(t.numel() * t.element_size() for t in entry.values())
        if key in self or self.nbytes + size > self.budget:
            return key in self
        self._keep(key, entry)
        self.nbytes += size
        return True

    def _count(self, found: Entry | None) -> None:
        self.hits += found is not None
        self.misses += found is None

    def _keep(self, key: str, entry: Entry) -> None:
        self.entries[key] = copies(entry)


def copies(entry: Entry) -> Entry:
    """Return copies in host memory; a view would keep the whole padded batch alive."""
    return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in entry.items()}


class DiskStore(Store):
    """Entries as files of a folder, found again by a resumed run.

    Args:
        budget: Bytes all entries may take together.
        folder: Where they lie; a file appears whole or not at all.

    Raises:
        TrainingError: If the folder cannot be written to.
    """

    def __init__(self, budget: float, folder: Path) -> None:
        super().__init__(budget)
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.part"):
                left.unlink()
        except OSError as error:
            raise TrainingError(
                f"The store of constants {folder} cannot be written: {error}.",
                "Choose another folder, or causal: recompute.",
            ) from error
        self.files = {file.stem: file.stat().st_size for file in folder.glob("*.safetensors")}
        self.nbytes = sum(self.files.values())

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def get(self, key: str) -> Entry | None:
        """Return an entry, or None; a file that cannot be read counts as missing."""
        found = None
        if key in self.files:
            try:
                found = load_file(self._file(key))
            except Exception as error:
                log.warning(
                    "The constants %s cannot be read (%s); they are made again.", key, error
                )
                del self.files[key]
        self._count(found)
        return found

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _keep(self, key: str, entry: Entry) -> None:
        part = self.folder / f"{key}.part"
        try:
            save_file(copies(entry), part)
            part.replace(self._file(key))
        except Exception as error:
            part.unlink(missing_ok=True)
            log.warning("The constants %s cannot be kept: %s.", key, error)
            self.budget = 0
            return
        self.files[key] = self._file(key).stat().st_size

    def clear(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def digest(*parts: object) -> str:
    """Return a short hash of texts, numbers and bytes."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()


def fingerprint(model: nn.Module, leave_out: Iterable[nn.Module] = ()) -> str:
    """Return a hash of everything the constants of a model depend on but the tokens.

    Every bit of every weight counts (a sum of the bits of each tensor and a sample of its values).

    Args:
        model: The model, with frozen adapters.
        leave_out: Modules whose weights do not count: the interventions.
    """
    own = {id(t) for m in leave_out for t in (*m.parameters(), *m.buffers())}
    config = getattr(model, "config", None)
    parts: list[object] = [
        getattr(config, "_name_or_path", ""),
        getattr(config, "_commit_hash", ""),
        getattr(config, "_attn_implementation", ""),
    ]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in own:
            parts += [name, tuple(tensor.shape), tensor.dtype, *_summary(tensor.detach())]
    return digest(*parts)


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _summary(tensor: Tensor) -> tuple[object, ...]:
    if tensor.numel() == 0 or tensor.is_meta:
        return ()
    flat = tensor.contiguous().flatten()
    bits = flat.view(BITS[flat.element_size()]) if flat.element_size() in BITS else flat
    sample = flat[:: max(1, flat.numel() // 64)]
    return int(bits.sum(dtype=torch.int64)), sample.to(torch.float64).cpu().numpy().tobytes()
