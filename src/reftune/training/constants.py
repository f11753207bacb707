"""The store of constants: what causal caching computed once, kept by content.

An entry is found by what it depends on and by nothing else: token ids, the base model's weights and
those of frozen adapters, precision, attention kernel, and where the constants end. A changed
template, base or adapter therefore misses; nothing can be stale. Two kinds of entries: keys and
values of a prefix (rows with equal prompts share one), and the output of block l0 at a suffix.

A store on disk is sealed when it holds all that a run will ask for. The seal names what that is, so
that a resumed run finds the same entries, bit for bit, and a run on other rows or weights empties
the folder first. Several processes may fill one folder: files appear whole, under names of content.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path

from jaxtyping import Shaped
from safetensors.torch import load_file, save_file
from torch import Tensor

from reftune.errors import TrainingError

log = logging.getLogger(__name__)

Entry = dict[str, Tensor]
"""Keys and values of blocks `[heads, p0, dim]`, or the states of a suffix `[S, d]`, by name."""
SEAL = "sealed"


class Store:
    """Entries in host memory, up to a number of bytes.

    The first entry that does not fit closes the store. What it holds is then decided by the order
    of the rows and the budget alone, and the same in a resumed run.

    Args:
        budget: Bytes all entries may take together.
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.nbytes, self.is_closed = budget, 0, False
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
        """Keep an entry; returns whether it is kept."""
        if key in self:
            return True
        size = sum(t.numel() * t.element_size() for t in entry.values())
        self.is_closed = self.is_closed or self.nbytes + size > self.budget
        if self.is_closed or not self._keep(key, entry):
            return False
        self.nbytes += size
        return True

    def _count(self, found: Entry | None) -> None:
        self.hits += found is not None
        self.misses += found is None

    def _keep(self, key: str, entry: Entry) -> bool:
        self.entries[key] = copies(entry)
        return True


def copies(entry: dict[str, Shaped[Tensor, "_ ..."]]) -> dict[str, Shaped[Tensor, "_ ..."]]:
    """Return copies in host memory; a view would keep the whole padded batch alive."""
    return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in entry.items()}


class DiskStore(Store):
    """Entries as files of a folder, found again by a resumed run.

    Args:
        budget: Bytes this process may write.
        folder: Where they lie; a file appears whole or not at all.

    Raises:
        TrainingError: If the folder cannot be written to.
    """

    def __init__(self, budget: float, folder: Path) -> None:
        super().__init__(budget)
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"The store of constants {folder} cannot be written: {error}.",
                "Choose another folder, or causal: recompute.",
            ) from error
        self.refresh()

    def refresh(self) -> None:
        """Look again at what lies there, other processes' files included."""
        self.files = {file.stem for file in self.folder.glob("*.safetensors")}
        self.is_closed = self.sealed is not None

    @property
    def sealed(self) -> str | None:
        """What the store is complete for, or None while it is being filled."""
        file = self.folder / SEAL
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def seal(self, content: str) -> None:
        """Say that the store holds all that fits of `content`; nothing is added from now on."""
        part = self._part(SEAL)
        part.write_text(content, encoding="utf-8")
        part.replace(self.folder / SEAL)
        self.refresh()

    def empty(self) -> None:
        """Delete what an interrupted run, or one on other rows or weights, left here."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.nbytes = 0
        self.refresh()

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
                self.files.discard(key)
        self._count(found)
        return found

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _part(self, key: str) -> Path:
        """Return a name no other process writes to."""
        return self.folder / f"{key}.{uuid.uuid4().hex}.part"

    def _keep(self, key: str, entry: Entry) -> bool:
        part = self._part(key)
        try:
            save_file(copies(entry), part)
            part.replace(self._file(key))
        except Exception as error:
            part.unlink(missing_ok=True)
            log.warning("The constants %s cannot be kept: %s.", key, error)
            self.is_closed = True
            return False
        self.files.add(key)
        return True
