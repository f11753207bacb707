"""Causal caching against plain hooks, LoRA and full fine-tuning: time and memory of a step.

Random Llamas (d = 512, 8 layers, 8 heads, 2 key-value heads, vocabulary 8,192), one thread,
interleaved, medians. Position sets: a = first and last 4 prompt tokens at all layers, b = last 4 at
all layers, c = the response at all layers, g = the last prompt token at layers 5, 6, 7. Modes:
plain (hooks, the model's own loss on all logits), lean (logits at labels only), recompute, store
(store starts at the first edited layer where that pays).

    python benchmarks/causal.py --quick
    python benchmarks/causal.py --resume runs/causal.jsonl --publish
    python benchmarks/causal.py --shape llama-3-8b --device cuda --dtype bfloat16 --rounds 10

`--resume FILE` writes down each prompt and answer length as it is done; a run that was stopped
goes on from there.

A row is a contender at one prompt and answer length (`d`: 256/32). `ratio_to_lora` is seconds over
those of PEFT LoRA r = 8 on q, v by its usual path (another row has its logits at labels only),
`ratio_to_plain` over LoReFT on set a by plain hooks; peaks are above weights and optimiser state,
the store's own memory left out. The rows named "ten epochs" compare whole trainings, the store's
building included. `--json` prints
`{"rows", "goals", "settings", "versions"}`; `--publish` puts that into docs/results.json, section
causal, and writes the page.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from dataclasses import asdict, replace
from typing import Any

LORA, LEAN = "lora r8, usual path", "lora r8, label logits"
FULL, PLAIN = "full, usual path", "a plain"
SETS: dict[str, tuple[str, Any]] = {
    "a": ("f4+l4", "all"),
    "b": ("l4", "all"),
    "c": ("response", "all"),
    "g": ("last", (5, 6, 7)),
}
ROWS_OF = {64: 8, 256: 4, 1024: 1}
"""Rows of a batch by prompt length."""
DRAWN = (
    FULL,
    LEAN,
    "a plain",
    "g plain",
    "b recompute",
    "g recompute",
    "c store",
    "b store",
    "g store",
)
"""Lines of the picture, at answers of 32 tokens."""

GOALS = [
    ("g store", "256/32", "ratio_to_lora", 0.07),
    ("g recompute", "256/32", "ratio_to_lora", 0.5),
    ("g store", "1024/32", "ratio_to_lora", 0.03),
    ("b store", "256/32", "ratio_to_lora", 0.16),
    ("b store", "1024/32", "ratio_to_lora", 0.08),
    ("ten epochs, g store", "256/32", "ratio_to_plain", 0.25),
    ("g store", "1024/32", "ratio_of_peak_to_lora", 0.25),
]
"""Contender, prompt/answer, column, upper bar."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="one row of 256/32, sets b and g, no goals judged"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--publish", action="store_true", help="add to docs/results.json")
    parser.add_argument("--resume", metavar="FILE", help="note what is done, and go on from it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--answers", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--rounds", type=int, default=None, help="rounds (default 5, quick 3)")
    parser.add_argument("--shape", default="causal", help="causal, llama-3-8b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="precision of the base model")
    parser.add_argument("--without-full", action="store_true", help="leave full fine-tuning out")
    parser.add_argument("--without-epochs", action="store_true", help="leave ten epochs out")
    return parser.parse_args(argv)


class Trained:
    """A model in training.

    Args:
        model: The model, its trainable parameters marked.
        batches: Batches it takes in turn.
        mode: `plain`, `lean`, `recompute` or `store`.
        device: Where it runs.
    """

    def __init__(self, model: Any, batches: list[dict[str, Any]], mode: str, device: str) -> None:
        import torch

        from reftune.model.run import Prepared, Runner
        from reftune.training.causal import make_source
        from reftune.training.plan import Settings, make_plan

        self.model, self.device, self.mode = model.train(), device, mode
        if hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
        self.batches, self.turn = batches, 0
        self.prepared = [Prepared(**batch) for batch in batches]
        source = None
        if mode in ("recompute", "store"):
            plan = make_plan(model, self.prepared, Settings(mode, budget=1e12))
            source = make_source(model, plan)
        self.runner = None if mode == "plain" else Runner(model, source)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)

    def forget(self) -> None:
        """Forget all constants, as before a training."""
        if self.mode == "store":
            source = self.runner.source
            self.runner.source = type(source)(self.model, type(source.store)(1e12), source.start)
        elif self.mode == "recompute":
            self.runner.source.forget()

    def step(self) -> float:
        """Train one step; return the loss."""
        from torch.nn import functional as F

        turn, self.turn = self.turn, (self.turn + 1) % len(self.batches)
        if self.runner is None:
            loss = self.model(**self.batches[turn]).loss
        else:
            if self.mode == "recompute":
                self.runner.source.forget()  # every step meets new rows
            output = self.runner(self.prepared[turn])
            loss = F.cross_entropy(output.logits.float(), output.labels)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.item()

    def check(self, name: str) -> None:
        """Raise RuntimeError if a store computed constants again that it should have kept."""
        if self.mode == "store" and self.runner.source.store.misses > self.runner.source.store.hits:
            raise RuntimeError(f"{name} finds little in its store: something changes its model")

    def seconds(self) -> float:
        """Return the seconds of one step."""
        from harness import timed

        return timed(self.step, self.device)

    def peak(self) -> int:
        """Return the peak bytes of one step above weights and optimiser state."""
        from harness import held_bytes, peak_bytes

        held = held_bytes([self.model], self.optimiser)
        return peak_bytes(self.step, [self.model], self.optimiser, self.device) - held


def with_loreft(base: Any, name: str) -> Any:
    """Return the base with LoReFT r = 4 on a position set."""
    from harness import sharing

    import reftune

    positions, layers = SETS[name]
    if layers != "all":
        last = base.config.num_hidden_layers
        layers = [last - 3, last - 2, last - 1]
    config = reftune.ReftConfig(reftune.LoreftConfig(rank=4), layers=layers, positions=positions)
    return reftune.get_peft_model(sharing(base), config)


def contenders(base: Any, settings: Any, args: argparse.Namespace) -> dict[str, Trained]:
    """Return everything that trains at one prompt and answer length."""
    from harness import random_batch, with_lora

    device = settings.device
    batch = random_batch(settings)
    batch["prompt_lens"] = (batch["labels"] != -100).int().argmax(1)
    plain = {k: v for k, v in batch.items() if k != "prompt_lens"}
    found = {
        LORA: Trained(with_lora(base), [plain], "plain", device),
        LEAN: Trained(with_lora(base), [batch], "lean", device),
    }
    if not args.without_full and not args.quick:
        # A copy: its steps would change the weights of all others, and no constant would last
        found[FULL] = Trained(copy.deepcopy(base), [plain], "plain", device)
    for name in dict.fromkeys(["a", *args.sets]):
        modes = ("plain", "lean") if name == "a" else ("plain", "lean", "recompute", "store")
        for mode in modes:
            rows = plain if mode == "plain" else batch
            found[f"{name} {mode}"] = Trained(with_loreft(base, name), [rows], mode, device)
    return found


def step_rows(base: Any, settings: Any, args: argparse.Namespace, rounds: int) -> list[dict]:
    """Time single steps in turns, then measure the peak of each."""
    from harness import take_turns

    prompt, answer = settings.width - settings.num_labels, settings.num_labels
    models = contenders(base, settings, args)
    samples = take_turns({name: m.seconds for name, m in models.items()}, rounds)
    peaks = {name: model.peak() for name, model in models.items()}
    for name, model in models.items():
        model.check(name)
    rows = []
    for name in models:
        row = {
            "name": name,
            "d": f"{prompt}/{answer}",
            "rows": settings.rows,
            "seconds": samples.median(name),
            "peak_bytes": peaks[name],
            "ratio_to_lora": samples.ratio(name, LORA),
            "ratio_to_plain": samples.ratio(name, PLAIN),
            "ratio_of_peak_to_lora": peaks[name] / peaks[LORA],
        }
        if name in DRAWN and answer == 32:
            row |= {"line": name, "x": {"prompt_tokens": prompt}}
        rows.append(row)
    return rows


def epoch_rows(base: Any, settings: Any, epochs: int = 10, number: int = 3) -> list[dict]:
    """Time whole trainings on `number` batches in turns: plain hooks, recompute, store."""
    from harness import now, random_batch, synchronise

    batches = []
    for seed in range(number):
        batch = random_batch(settings, seed + 1)
        batch["prompt_lens"] = (batch["labels"] != -100).int().argmax(1)
        batches.append(batch)
    plain = [{k: v for k, v in b.items() if k != "prompt_lens"} for b in batches]
    modes = ("plain", "recompute", "store")
    models = {
        mode: Trained(
            with_loreft(base, "g"), plain if mode == "plain" else batches, mode, settings.device
        )
        for mode in modes
    }
    seconds = dict.fromkeys(modes, 0.0)
    for model in models.values():
        model.step()
        model.forget()
        model.turn = 0
    for epoch in range(epochs):
        for mode in modes[epoch % 3 :] + modes[: epoch % 3]:
            synchronise(settings.device)
            start = now(settings.device)
            for _ in range(number):
                models[mode].step()
            synchronise(settings.device)
            seconds[mode] += now(settings.device) - start
    return [
        {
            "name": f"ten epochs, g {mode}",
            "d": f"{settings.width - settings.num_labels}/{settings.num_labels}",
            "rows": settings.rows,
            "seconds": value,
            "peak_bytes": None,
            "ratio_to_lora": None,
            "ratio_to_plain": value / seconds["plain"],
            "ratio_of_peak_to_lora": None,
        }
        for mode, value in seconds.items()
    ]


def judge(rows: list[dict]) -> list[dict]:
    """Return every goal with its value and whether it holds; None where it was not measured."""
    table = {(row["name"], row["d"]): row for row in rows}
    found = []
    for name, place, column, bar in GOALS:
        value = table.get((name, place), {}).get(column)
        goal = {"name": name, "d": place, "column": column, "bar": f"<= {bar}"}
        found.append({**goal, "value": value, "holds": None if value is None else value <= bar})
    return found


def show(result: dict[str, Any]) -> None:
    """Print tables."""
    heads = ("ms", "peak MiB", "/lora", "/plain a", "peak/lora")
    print(f"{'prompt/answer':>14}  {'name':<24}" + "".join(f"{h:>11}" for h in heads))
    for row in result["rows"]:
        peak = row["peak_bytes"]
        values = [
            f"{row['seconds'] * 1000:.1f}",
            "-" if peak is None else f"{peak / 2**20:.0f}",
            *(
                "-" if row[key] is None else f"{row[key]:.3f}"
                for key in ("ratio_to_lora", "ratio_to_plain", "ratio_of_peak_to_lora")
            ),
        ]
        print(f"{row['d']:>14}  {row['name']:<24}" + "".join(f"{v:>11}" for v in values))
    for goal in result["goals"]:
        if goal["holds"] is not None:
            mark = "holds" if goal["holds"] else "MISSED"
            what = f"{goal['d']} {goal['name']}, {goal['column']} {goal['bar']}"
            print(f"{mark:>8}  {goal['value']:.3f}  {what}")


def measured(base: Any, settings: Any, args: argparse.Namespace, done: Any) -> list[dict]:
    """Return the rows of all prompt and answer lengths; those noted before are not run again."""
    rows: list[dict] = []
    for prompt in args.prompts:
        for answer in args.answers:
            cell = f"{prompt}/{answer}"
            if cell not in done.cells:
                several = ROWS_OF.get(prompt, max(1, 1024 // prompt))
                chosen = replace(
                    settings,
                    rows=1 if args.quick else several,
                    width=prompt + answer,
                    num_labels=answer,
                )
                found = step_rows(base, chosen, args, args.rounds)
                if answer == 32 and not args.without_epochs:
                    found += epoch_rows(base, chosen, number=1 if args.quick else 3)
                done.add(cell, found)
            rows += done.cells[cell]
            print(f"{cell} done", file=sys.stderr, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = arguments(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    import torch
    import transformers
    from harness import SHAPES, Done, Settings, command, machine, random_llama

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    if args.shape not in SHAPES:
        print(f"Error: --shape {args.shape}. Known: {', '.join(SHAPES)}.", file=sys.stderr)
        return 2
    if args.quick:
        args.prompts, args.answers, args.sets = [256], [32], ["b", "g"]
    args.rounds = args.rounds or (3 if args.quick else 5)
    settings = Settings(
        shape=args.shape, device=args.device, dtype=args.dtype, threads=args.threads, rank=4
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    how = {
        name: getattr(args, name)
        for name in ("sets", "rounds", "quick", "without_full", "without_epochs")
    }
    done = Done(args.resume, {**asdict(settings), **versions, **how})
    rows = measured(random_llama(settings), settings, args, done)
    result = {
        "rows": rows,
        "goals": [] if args.quick else judge(rows),  # they are for batches of the full run
        "settings": {
            "command": command("benchmarks/causal.py", argv),
            "machine": machine(args.device),
            "threads": args.threads,
            "rounds": args.rounds,
            "shape": args.shape,
            "dtype": args.dtype,
            "device": args.device,
            "quick": args.quick,
        },
        "versions": versions,
    }
    if args.publish:
        from reftune.report.measured import publish_measured

        publish_measured(result, "causal", command("benchmarks/causal.py", argv))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
