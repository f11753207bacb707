"""Training step and decoding of LoReFT against LoRA, full fine-tuning, pyreft and the base model.

Random Llamas, 8 x 256 tokens a batch, 16 label tokens a row, positions f7+l7, rank 4; LoRA has
rank 8 on the query and value projections. "usual path" is the model's own loss (`labels=`), which
builds logits at every token; "label logits" is reftune's run seam. All contenders share one set of
base weights and one process, except pyreft, whose steps run in a process of its own environment
between the others'. How seconds, ratios and bytes come about: `harness.py`.

    python benchmarks/step.py --quick
    python benchmarks/step.py --d 512 1024 --pyreft-python pyreft-env/bin/python
    python benchmarks/step.py --d llama-3-8b --device cuda --dtype bfloat16 --rounds 10

How to make pyreft's environment stands in `worker_client.py` (`HOW`). `--json` prints `{"rows",
"goals", "settings", "versions", "skipped"}`; `--publish` puts that into docs/results.json, section
speed, and writes the page. `ratio_to_base` of decoding is tokens/s over the base model's, every
other ratio is seconds over the other's seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

USUAL, LEAN = "lora r8, usual path", "lora r8, label logits"
ALL, TOP = "loreft r4, all layers", "loreft r4, top layer"
SLOW = "loreft r4, usual path"
FULL, PYREFT, BASE = "full, usual path", "pyreft loreft r4, all layers", "base"

GOALS = [
    (ALL, "ratio_to_lora", "<=", 0.75),
    (ALL, "ratio_to_lora_label_logits", "<=", 1.0),
    (ALL, "ratio_to_pyreft", "<=", 0.6),
    (TOP, "ratio_to_lora", "<=", 0.35),
    ("decode, " + ALL, "ratio_to_base", ">=", 0.98),
]
"""Row, column, direction and bar."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller batches, no full fine-tuning")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--publish", action="store_true", help="add to docs/results.json")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--d", nargs="+", default=["512"], help="512, 1024, llama-3-8b")
    parser.add_argument("--rounds", type=int, default=None, help="rounds (default 7, quick 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="precision of the base model")
    parser.add_argument("--pyreft-python", help="interpreter of an environment with pyreft")
    parser.add_argument("--without-full", action="store_true", help="leave full fine-tuning out")
    parser.add_argument("--without-decoding", action="store_true")
    return parser.parse_args(argv)


class Trained:
    """A model in training with its optimiser.

    Args:
        model: The model, its trainable parameters marked.
        batch: `input_ids`, `attention_mask`, `labels`.
        label_logits: Whether the head runs on label positions only.
        device: Where it runs.
    """

    def __init__(self, model: Any, batch: dict[str, Any], label_logits: bool, device: str) -> None:
        import torch

        from reftune.model.run import Prepared, Runner

        self.model, self.batch, self.device = model.train(), batch, device
        self.runner = Runner(model) if label_logits else None
        self.prepared = Prepared(**batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in trained)
        self.optimiser = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)

    def step(self) -> float:
        """Train one step; return the loss."""
        from torch.nn import functional as F

        if self.runner is None:
            loss = self.model(**self.batch).loss
        else:
            output = self.runner(self.prepared)
            loss = F.cross_entropy(output.logits.float(), output.labels)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.item()

    def seconds(self) -> float:
        """Return the seconds of one step."""
        from harness import timed

        return timed(self.step, self.device)

    def peak(self) -> int:
        """Return the peak bytes of one step."""
        from harness import peak_bytes

        return peak_bytes(self.step, [self.model], self.optimiser, self.device)


def with_loreft(base: Any, settings: Any, layers: Any = "all") -> Any:
    """Return the base with LoReFT."""
    from harness import sharing

    import reftune

    config = reftune.ReftConfig(
        reftune.LoreftConfig(rank=settings.rank),
        layers=layers,
        positions=f"f{settings.prefix}+l{settings.suffix}",
    )
    return reftune.get_peft_model(sharing(base), config)


def contenders(base: Any, settings: Any, full: bool) -> dict[str, Trained]:
    """Return everything that trains in this process."""
    from harness import random_batch, sharing, with_lora

    batch, device = random_batch(settings), settings.device
    top = [base.config.num_hidden_layers - 1]
    found = {
        USUAL: Trained(with_lora(base), batch, False, device),
        LEAN: Trained(with_lora(base), batch, True, device),
        ALL: Trained(with_loreft(base, settings), batch, True, device),
        TOP: Trained(with_loreft(base, settings, top), batch, True, device),
        SLOW: Trained(with_loreft(base, settings), batch, False, device),
    }
    if full:
        found[FULL] = Trained(sharing(base), batch, False, device)
    return found


def training_rows(
    args: argparse.Namespace, base: Any, settings: Any, rounds: int, versions: dict[str, str]
) -> list[dict]:
    """Time training steps in turns; measure the peak of each afterwards; note pyreft's versions."""
    from harness import take_turns
    from worker_client import Worker

    models = contenders(base, settings, not (args.without_full or args.quick))
    python = args.pyreft_python
    with Worker(python, settings) if python else nullcontext() as worker:
        steps: dict[str, Callable[[], float]] = {n: m.seconds for n, m in models.items()}
        peaks: dict[str, Callable[[], int]] = {n: m.peak for n, m in models.items()}
        if worker is not None:
            versions.update({k: worker.versions[k] for k in ("pyreft", "pyvene")})
            steps[PYREFT] = worker.step
            peaks[PYREFT] = lambda: worker.ask("peak")["peak_bytes"]
        samples = take_turns(steps, rounds)
        found = {name: peak() for name, peak in peaks.items()}
    return [
        {
            "name": name,
            "d": settings.shape,
            "seconds": samples.median(name),
            "peak_bytes": found[name],
            "ratio_to_lora": samples.ratio(name, USUAL),
            "ratio_to_lora_label_logits": samples.ratio(name, LEAN),
            "ratio_to_base": None,
            "ratio_to_pyreft": samples.ratio(name, PYREFT),
            "slowest": max(samples.seconds[name]),
            "fastest": min(samples.seconds[name]),
            "trainable": models[name].num_trained if name in models else None,
        }
        for name in samples.seconds
    ]


def decoding_rows(base: Any, settings: Any, rounds: int, tokens: int) -> list[dict]:
    """Time single tokens of greedy decoding, batch 1, prompt 64, after the prefill."""
    import torch
    from harness import sharing, with_lora

    models = {
        BASE: sharing(base).eval(),
        ALL: with_loreft(base, settings).eval(),
        LEAN.split(",")[0]: with_lora(base).eval(),
    }
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, base.config.vocab_size, (1, 64), generator=generator)
    prompt = prompt.to(settings.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    ratios: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-1, rounds):
        medians = {}
        names = list(models)
        for name in names[turn % 3 :] + names[: turn % 3]:
            clock = Clock(settings.device)
            models[name].generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=clock,
                max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True,
                pad_token_id=0,
            )  # fmt: skip
            # times[0] is the prompt, times[1] the token of the prefill
            steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:])]
            medians[name] = statistics.median(steps)
        for name, value in medians.items() if turn >= 0 else ():
            seconds[name].append(value)
            ratios[name].append(medians[BASE] / value)
    return [
        {
            "name": f"decode, {name}",
            "d": settings.shape,
            "seconds": statistics.median(seconds[name]),
            "peak_bytes": decoding_peak(models[name], prompt, settings.device),
            "ratio_to_lora": None,
            "ratio_to_base": statistics.median(ratios[name]),
            "ratio_to_pyreft": None,
            "tokens_per_second": 1 / statistics.median(seconds[name]),
        }
        for name in models
    ]


class Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self, device: str) -> None:
        self.times: list[float] = []
        self.device = device

    def put(self, value: Any) -> None:
        """Note the time of one token."""
        from harness import now, synchronise

        synchronise(self.device)
        self.times.append(now(self.device))

    def end(self) -> None:
        """Nothing to do."""


def decoding_peak(model: Any, prompt: Any, device: str) -> int:
    """Return the peak bytes of prefill and eight tokens."""
    from harness import peak_bytes

    def run() -> None:
        model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)

    return peak_bytes(run, [model], None, device)


def judge(rows: list[dict]) -> list[dict]:
    """Return every goal with its value and whether it holds; None where it was not measured."""
    found = []
    for shape in dict.fromkeys(row["d"] for row in rows):
        table = {row["name"]: row for row in rows if row["d"] == shape}
        for name, column, direction, bar in GOALS:
            value = table.get(name, {}).get(column)
            holds = None
            if value is not None:
                holds = value <= bar if direction == "<=" else value >= bar
            goal = {"name": name, "d": shape, "column": column, "bar": f"{direction} {bar}"}
            found.append({**goal, "value": value, "holds": holds})
    return found


def show(result: dict[str, Any]) -> None:
    """Print tables."""
    columns = ["ratio_to_lora", "ratio_to_lora_label_logits", "ratio_to_base", "ratio_to_pyreft"]
    heads = ["/lora", "/lora lean", "/base", "/pyreft"]
    print(f"{'d':>10}  {'name':<32}{'ms':>10}{'peak MiB':>10}" + "".join(f"{h:>12}" for h in heads))
    for row in result["rows"]:
        ratios = "".join(
            f"{row.get(column):>12.3f}" if row.get(column) is not None else f"{'-':>12}"
            for column in columns
        )
        peak = row["peak_bytes"] / 2**20
        ms = row["seconds"] * 1000
        print(f"{row['d']:>10}  {row['name']:<32}{ms:>10.2f}{peak:>10.0f}{ratios}")
    for goal in result["goals"]:
        if goal["holds"] is not None:
            mark = "holds" if goal["holds"] else "MISSED"
            what = f"{goal['d']}: {goal['name']}, {goal['column']} {goal['bar']}"
            print(f"{mark:>8}  {goal['value']:.3f}  {what}")
    for name, why in result["skipped"].items():
        print(f" skipped  {name}: {why}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if pyreft was asked for and failed."""
    args = arguments(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    import torch
    import transformers
    from harness import SHAPES, Settings, command, machine, random_llama
    from worker_client import HOW, WorkerError

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    unknown = sorted(set(args.d) - set(SHAPES))
    if unknown:
        print(f"Error: --d {', '.join(unknown)}. Known: {', '.join(SHAPES)}.", file=sys.stderr)
        return 2
    rounds = args.rounds or (3 if args.quick else 7)
    settings = Settings(device=args.device, dtype=args.dtype, threads=args.threads)
    if args.quick:
        settings = replace(settings, rows=4, width=128)
    rows: list[dict] = []
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        for shape in args.d:
            chosen = replace(settings, shape=shape)
            base = random_llama(chosen)
            rows += training_rows(args, base, chosen, rounds, versions)
            if not args.without_decoding:
                rows += decoding_rows(base, chosen, rounds, 24 if args.quick else 64)
    except WorkerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    skipped = {} if args.pyreft_python else {PYREFT: "no --pyreft-python given. " + HOW}
    if args.quick:
        skipped[FULL] = "left out of --quick"
    settings_out = {**asdict(settings), "rounds": rounds, "quick": args.quick}
    settings_out["machine"] = machine(args.device)
    settings_out["peak_bytes"] = "tensors alive at the highest point of a step; see harness.py"
    result = {"rows": rows, "goals": judge(rows), "settings": settings_out}
    result |= {"versions": versions, "skipped": skipped}
    if args.publish:
        from reftune.report.measured import publish_measured

        publish_measured(result, "speed", command("benchmarks/step.py", argv))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
