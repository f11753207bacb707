"""Training of the embedded models: one process, one thread, bf16 products, exactly resumable.

The rate warms up over 300 steps and then stays constant, so training can go on for ever. A release
is a short *decay branch* from any checkpoint: `decay_from` copies weights and optimiser, trains on
for 15 % of all tokens while the rate falls to zero, and never touches the run it came from. The
last 10 % of tokens are partly rows of 1,024, items that may look at earlier ones, so that the whole
context is trained. Left out on purpose: several processes, gradient accumulation across steps,
other optimisers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from reftune.nano import forward, packing
from reftune.nano.mix import ENCODER_PHASES, PHASES, Document, Mix
from reftune.nano.shapes import CONTEXT, build_model
from reftune.nano.tokenizer import MASK_ID, load_tokenizer

log = logging.getLogger(__name__)

DECAY_SHARE = 0.15
"""Share of all tokens the decay branch takes."""

LONG_PHASE = 2 / 3
"""The last part of the decay branch that holds long rows: 10 % of all tokens."""


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; stored in its checkpoints.

    Attributes:
        model: Shape, see `shapes.build_config`.
        plan: Tokens after which the curriculum is complete.
        rate: Learning rate of the constant phase.
        step_tokens: Tokens of an optimiser step.
        warmup: Steps of linear warm-up.
        weight_decay: On matrices only, not on norms, biases and embeddings.
        clip: Largest norm of the gradient.
        seed: Seed of weights and data.
        long_share: Share of long rows' tokens in the last 10 % of tokens.
        checkpoint_tokens: Distance of checkpoints.
        decay_start: Tokens at which a decay branch began; None in the constant phase.
    """

    model: str = "nano"
    plan: float = 30e6
    rate: float = 1.5e-3
    step_tokens: int = 6144
    warmup: int = 300
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    long_share: float = 0.3
    checkpoint_tokens: float = 5e5
    decay_start: int | None = None

    @property
    def decay_tokens(self) -> float:
        """Length of the decay branch: `DECAY_SHARE` of the tokens of the whole training."""
        return (self.decay_start or 0) * DECAY_SHARE / (1 - DECAY_SHARE)

    def rate_at(self, step: int, tokens: int) -> float:
        """Return the learning rate of the next step.

        >>> Settings(rate=1.0).rate_at(149, 0)
        0.5
        >>> Settings(rate=1.0, decay_start=85).rate_at(1000, 85 + 6)
        0.6
        """
        rate = self.rate * min(1.0, (step + 1) / self.warmup)
        if self.decay_start is not None:
            rate *= max(0.0, 1 - (tokens - self.decay_start) / self.decay_tokens)
        return round(rate, 12)


class Run:
    """State of a training run and its folder (`log.jsonl`, `checkpoints/`, `tokenizer/`)."""

    def __init__(self, out: Path, settings: Settings, tokenizer_dir: Path | None = None) -> None:
        self.out, self.settings = out, settings
        self.tokenizer = load_tokenizer(tokenizer_dir)
        phases = ENCODER_PHASES if settings.model == "nano-encoder" else PHASES
        self.mix = Mix(self.tokenizer.backend_tokenizer, settings.seed, phases)
        self.worlds = [*phases[0][1], "long"]
        self.model = build_model(settings.model, settings.seed).train()
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        parameters = list(self.model.parameters())
        decayed = [p for p in parameters if p.ndim > 1 and id(p) not in tables]
        others = [p for p in parameters if p.ndim <= 1 or id(p) in tables]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.step = self.tokens = 0
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @property
    def progress(self) -> float:
        """Place in the curriculum: tokens seen over tokens planned; training may go on past 1."""
        return self.tokens / self.settings.plan

    def save(self) -> Path:
        """Write a checkpoint atomically; keep the newest two and one each 5 M tokens."""
        folder = self.out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"tokens-{self.tokens:010d}.pt"
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mix": self.mix.state_dict(),
            "sums": dict(self.sums),
            "step": self.step,
            "tokens": self.tokens,
        }
        temporary = target.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, target)
        kept: set[int] = set()
        for old in sorted(folder.glob("tokens-*.pt"))[:-2]:
            mark = int(old.stem.split("-")[1]) // 5_000_000
            if mark == 0 or mark in kept:
                old.unlink()
            kept.add(mark)
        return target

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, bit-equal to a run that was never stopped."""
        state = torch.load(checkpoint, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mix.load_state_dict(state["mix"])
        self.sums.update(state["sums"])
        self.step, self.tokens = state["step"], state["tokens"]

    def take(self, weights: Path) -> None:
        """Go on from released weights: their tokens count, their optimiser is gone."""
        from safetensors.torch import load_file

        record = json.loads((weights / "training.json").read_text())
        state = {n: t.float() for n, t in load_file(weights / "model.safetensors").items()}
        missing, unknown = self.model.load_state_dict(state, strict=False)
        tied = set(self.model._tied_weights_keys or ())
        if unknown or set(missing) - tied:
            raise ValueError(f"{weights} holds other parameters than {self.settings.model}.")
        self.model.tie_weights()
        self.tokens = record["tokens"]
        self.mix.counts = dict(record["tokens_per_world"])
        self.mix.rng = random.Random(f"mix-{self.settings.seed}-{self.tokens}")

    def next_documents(self) -> list[Document]:
        """Draw the documents of the next step; late in the decay branch also long ones."""
        settings = self.settings
        size, long = settings.step_tokens, []
        if settings.decay_start is not None and settings.model != "nano-encoder":
            done = (self.tokens - settings.decay_start) / settings.decay_tokens
            if done > 1 - LONG_PHASE:
                number = max(1, round(settings.long_share * size / CONTEXT))
                long = [self.mix.conversation(CONTEXT, self.progress) for _ in range(number)]
        return long + self.mix.step(size - sum(len(d.ids) for d in long), self.progress)

    def train_step(self) -> None:
        """Do one optimiser step."""
        documents = self.next_documents()
        rate = self.settings.rate_at(self.step, self.tokens)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        batches = packing.pack(documents, self.worlds, generator)
        if self.settings.model == "nano-encoder":
            batches = [mask_tokens(batch, generator) for batch in batches]
        total = sum(batch.weights.sum() for batch in batches)
        for batch in batches:
            scores = forward.logits(self.model, batch).float()
            losses = F.cross_entropy(scores, batch.targets, reduction="none")
            ((losses * batch.weights).sum() / total).backward()
            self._count(losses.detach(), batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(len(document.ids) for document in documents)

    def _count(self, losses: torch.Tensor, batch: packing.Batch) -> None:
        """Add up the loss of answers and statements per sub-world."""
        answers = batch.weights >= 1
        for number, world in enumerate(self.worlds):
            chosen = losses[answers & (batch.worlds == number)]
            if chosen.numel():
                self.sums[world][0] += chosen.sum().item()
                self.sums[world][1] += chosen.numel()

    def report(self, seconds: float, tokens: int) -> dict[str, Any]:
        """Write one line to `log.jsonl` and return it; the running sums start anew."""
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "rate": self.settings.rate_at(self.step, self.tokens),
            "tokens_per_second": round(tokens / max(seconds, 1e-9)),
            "progress": round(self.progress, 4),
            "loss": {w: round(s / n, 4) for w, (s, n) in sorted(self.sums.items()) if n},
        }
        self.sums.clear()
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def mask_tokens(batch: packing.Batch, generator: torch.Generator) -> packing.Batch:
    """Turn a packed batch into a masked-language one: 15 % of the tokens, 80 % of them `<mask>`."""
    lottery = torch.rand(batch.ids.shape, generator=generator)
    chosen = (lottery < 0.15) & (batch.documents >= 0) & (batch.position_ids > 0)
    scored = chosen.flatten().nonzero()[:, 0]
    ids = torch.where(chosen & (lottery < 0.12), MASK_ID, batch.ids)
    return packing.Batch(
        ids=ids,
        position_ids=batch.position_ids + 1,
        documents=batch.documents,
        scored=scored,
        targets=batch.ids.flatten()[scored],
        weights=torch.ones(len(scored)),
        worlds=torch.zeros(len(scored), dtype=torch.long),
        causal=False,
    )


def newest(folder: Path) -> Path:
    """Return the newest checkpoint of a run folder."""
    found = sorted((folder / "checkpoints").glob("tokens-*.pt"))
    if not found:
        raise FileNotFoundError(f"No checkpoint in {folder}/checkpoints. Train first.")
    return found[-1]


def open_run(
    out: Path,
    settings: Settings,
    resume: bool = False,
    decay_from: Path | None = None,
    tokenizer_dir: Path | None = None,
    weights: Path | None = None,
) -> Run:
    """Start a run, continue one, branch a decay off a checkpoint, or go on from weights.

    Args:
        out: Folder of the run.
        settings: Used for a new run; a resumed or branched one keeps its own.
        resume: Continue from the newest checkpoint in `out`.
        decay_from: Checkpoint a decay branch begins at.
        tokenizer_dir: Tokenizer of a new run; None takes the packaged one.
        weights: Folder of released weights that a new run goes on from, with a new optimiser, its
            own warm-up and items that were not drawn before.

    Raises:
        FileExistsError: If `out` holds a run already.
        FileNotFoundError: If there is nothing to resume, or no weights.
    """
    source = newest(out) if resume else decay_from
    if not resume and list((out / "checkpoints").glob("tokens-*.pt")):
        raise FileExistsError(f"{out} holds a run. Continue it with --resume or choose another.")
    if source is not None:
        state = torch.load(source, weights_only=False)
        settings = Settings(**state["settings"])
        if not resume:
            settings = Settings(**{**state["settings"], "decay_start": state["tokens"]})
        own = source.parent.parent / "tokenizer"
        tokenizer_dir = own if own.is_dir() else tokenizer_dir
    if source is None and weights is not None:
        record = json.loads((weights / "training.json").read_text())
        settings = Settings(**{**record["settings"], "decay_start": None})
        tokenizer_dir = weights
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, settings, tokenizer_dir)
    run.tokenizer.save_pretrained(out / "tokenizer")
    if source is not None:
        run.restore(source)
    elif weights is not None:
        run.take(weights)
    return run


def train(run: Run, tokens: float = math.inf, minutes: float = math.inf, every: int = 20) -> Path:
    """Train until a token count, a time, or the end of the decay; return the last checkpoint.

    Args:
        run: From `open_run`.
        tokens: Stop at this many tokens in all.
        minutes: Stop after this time.
        every: Steps between two lines of the log.
    """
    settings = run.settings
    if settings.decay_start is not None:
        tokens = min(tokens, settings.decay_start + settings.decay_tokens)
    start = mark = time.monotonic()
    seen = run.tokens
    next_save = (run.tokens // settings.checkpoint_tokens + 1) * settings.checkpoint_tokens
    while run.tokens < tokens and time.monotonic() - start < 60 * minutes:
        run.train_step()
        if run.step % every == 0:
            now = time.monotonic()
            line = run.report(now - mark, run.tokens - seen)
            mark, seen = now, run.tokens
            losses = " ".join(f"{world} {loss:.3f}" for world, loss in line["loss"].items())
            log.info(
                "%7d steps %6.2f M tokens %5d tokens/s  %s",
                run.step, run.tokens / 1e6, line["tokens_per_second"], losses,
            )  # fmt: skip
        if run.tokens >= next_save:
            run.save()
            next_save += settings.checkpoint_tokens
    return run.save()


def limit_threads(threads: int = 1) -> None:
    """Use one thread: bit-equal resumes, and the other core stays free."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
