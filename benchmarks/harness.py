"""What the benchmarks share: random Llamas, batches, interleaved timing, peak memory.

Runs in other projects' environments too, so it imports torch and transformers only.

Seconds are those of the process's own work on a CPU with one thread, so that other programs beside
it do not count, and wall seconds elsewhere. What is compared takes turns, round by round, in an
order that rotates; a figure is the median over rounds, a ratio the median of the ratios within a
round (a slow moment of the machine hits both sides). Peak bytes: all tensors alive at the highest
point of one step, namely parameters, optimiser state and gradients at its start plus what torch's
allocator handed out on top. On a GPU the allocator keeps that count itself; on the CPU it is summed
from the profiler's memory events.
Scratch space inside kernels is not in it.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, int]] = {
    "128": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 1000,
    },
    "512": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
    "1024": {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16},
    "causal": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
}
"""Model shapes by name; 512 and 1024 have 8 layers and a vocabulary of 32,000."""


@dataclass(frozen=True)
class Settings:
    """What all contenders of a run share."""

    shape: str = "512"
    """A key of `SHAPES`."""
    rows: int = 8
    """Rows of a batch."""
    width: int = 256
    """Tokens of a row."""
    num_labels: int = 16
    """Label tokens of a row, its last ones."""
    rank: int = 4
    """Rank of the interventions."""
    prefix: int = 7
    """Edited tokens at the start of the prompt."""
    suffix: int = 7
    """Edited tokens at its end."""
    device: str = "cpu"
    """Where it runs."""
    dtype: str = "float32"
    """Precision of the base model."""
    threads: int = 1
    """CPU threads of each process."""
    seed: int = 0
    """Seed of weights and tokens."""
    ragged: bool = False
    """Whether each row's prompt is 3 tokens shorter than the one before (padded on the right)."""

    def prompt_len(self, row: int) -> int:
        """Return the prompt tokens of a row."""
        return self.width - self.num_labels - (3 * row if self.ragged else 0)


@dataclass
class Samples:
    """Seconds of each contender, round by round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Note one measurement."""
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Return the median over rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float | None:
        """Return the median of name/other within each round, or None if one was not run."""
        if name not in self.seconds or other not in self.seconds:
            return None
        pairs = zip(self.seconds[name], self.seconds[other])
        return statistics.median(a / b for a, b in pairs)


def random_llama(settings: Settings) -> Any:
    """Return a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_hidden_layers": 8, "vocab_size": 32000, **SHAPES[settings.shape]}
    shape.setdefault("num_key_value_heads", shape["num_attention_heads"])
    config = LlamaConfig(**shape, max_position_embeddings=2048, use_cache=False)
    torch.manual_seed(settings.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, settings.dtype))
    try:
        with torch.device(settings.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters use the same memory."""
    memo = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def with_lora(base: Any) -> Any:
    """Return the base with LoRA of rank 8 on the query and value projections."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(sharing(base), config)


def random_batch(settings: Settings, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, each `[rows, width]`."""
    vocab = SHAPES[settings.shape].get("vocab_size", 32000)
    generator = torch.Generator().manual_seed(settings.seed if seed is None else seed)
    ids = torch.randint(3, vocab, (settings.rows, settings.width), generator=generator)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row in range(settings.rows):
        end = settings.prompt_len(row) + settings.num_labels
        labels[row, end - settings.num_labels : end] = ids[row, end - settings.num_labels : end]
        mask[row, end:] = 0
        ids[row, end:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}


def locations(settings: Settings) -> list[list[int]]:
    """Return the edited places of each row: the first and last tokens of its prompt."""
    ends = [settings.prompt_len(row) for row in range(settings.rows)]
    return [[*range(settings.prefix), *range(end - settings.suffix, end)] for end in ends]


def checksum(model: nn.Module) -> float:
    """Return a number that tells whether two processes built the same weights."""
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """Return what it ran on: the GPU, or architecture and number of cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} with {os.cpu_count()} cores"


def command(script: str, argv: list[str] | None = None) -> str:
    """Return the command line to print beside figures, without paths of this machine."""
    words = [script, *(sys.argv[1:] if argv is None else argv)]
    for index, word in enumerate(words):
        if word == "--pyreft-python":
            words[index + 1] = "pyreft-env/bin/python"
        elif word.startswith("--pyreft-python="):
            words[index] = "--pyreft-python=pyreft-env/bin/python"
    if "--publish" in words:
        words.remove("--publish")
    return "python " + " ".join(words)


def now(device: str = "cpu") -> float:
    """Return seconds on the clock of this run; only differences mean anything."""
    is_alone = device == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if is_alone else time.perf_counter()


def timed(step: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds of one call."""
    synchronise(device)
    start = now(device)
    step()
    synchronise(device)
    return now(device) - start


def take_turns(steps: dict[str, Callable[[], float]], rounds: int, warmup: int = 1) -> Samples:
    """Run each step once a round, in rotating order; each returns its seconds."""
    samples, names = Samples(), list(steps)
    for index in range(-warmup, rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = steps[name]()
            if index >= 0:
                samples.add(name, seconds)
    return samples


def held_bytes(models: Iterable[nn.Module], optimiser: Any = None) -> int:
    """Return the bytes of parameters, buffers, gradients and optimiser state, each once."""
    tensors = [
        tensor
        for model in models
        for parameter in model.parameters()
        for tensor in (parameter, parameter.grad)
        if tensor is not None
    ]
    tensors += [buffer for model in models for buffer in model.buffers()]
    for state in optimiser.state.values() if optimiser is not None else ():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_bytes(
    step: Callable[[], Any], models: Iterable[nn.Module], optimiser: Any, device: str = "cpu"
) -> int:
    """Return the bytes of all tensors alive at the highest point of one step; see above.

    The step must have run before, so that the optimiser has its state.
    """
    held = held_bytes(list(models), optimiser)
    if device.startswith("cuda"):
        synchronise(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronise(device)
        return held + torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


class Done:
    """What was measured so far, a line of a file for each prompt and answer length.

    Args:
        file: The file, or None to note nothing.
        key: What has to be equal for a line to count: settings and versions.
    """

    def __init__(self, file: str | None, key: dict[str, Any]) -> None:
        self.file, self.key = None if file is None else Path(file), json.loads(json.dumps(key))
        self.cells: dict[str, list[dict]] = {}
        if self.file is not None and self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            return  # half a line of a run that was killed
        if found["key"] == self.key:
            self.cells[found["cell"]] = found["rows"]

    def add(self, cell: str, rows: list[dict]) -> None:
        """Note the rows of one prompt and answer length."""
        self.cells[cell] = rows
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"key": self.key, "cell": cell, "rows": rows}) + "\n")
