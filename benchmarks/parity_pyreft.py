"""reftune's LoReFT against pyreft's: same W, b and R, same logits, same learning; weight decay.

1. Logits at label positions of a random Llama, positions f7+l7 in every layer, rows of different
   length: largest absolute difference at most 1e-5.
2. Loss over 50 steps from equal init, AdamW without weight decay, R fixed: W and b are the same
   numbers in both, so the curves agree to rounding (1e-4).
3. The same with R trained. pyreft learns R through Householder reflections on a fixed d x d base,
   reftune through the QR of a free matrix F. A reflection turns R by twice the change of its
   vector, and the QR's answer to a change of F goes with 1/|F|; so F starts at R/2 here (its QR is
   R), and both turn R equally fast. Adam still works in other coordinates: at most 5 % of what the
   loss fell. (Started at F = R, reftune's R learns half as fast at the same learning rate.)

pyreft's prompts count their "last" token one too early in its data modules and its collator adds a
padding token; here both get the same places explicitly, so neither matters.

    python -m venv pyreft-env
    pyreft-env/bin/pip install torch "transformers>=5" "pyvene==0.1.8"
    pyreft-env/bin/pip install --no-deps "pyreft==0.1.0"
    python benchmarks/parity_pyreft.py --pyreft-python pyreft-env/bin/python

`--json` prints `{"rows": [{"name", "value", "bar", "holds", ...}], "settings", "versions"}`;
`--publish` puts that into docs/results.json, section parity, and writes the page. The exit code is
1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

LOGITS, FIXED, TRAINED, DECAYED = 1e-5, 1e-4, 0.05, 1e-6


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pyreft-python", required=True, help="interpreter with pyreft")
    parser.add_argument("--quick", action="store_true", help="the small model only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--publish", action="store_true", help="add to docs/results.json")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--d", nargs="+", default=["128", "512"], help="128, 512, 1024")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=2e-3)
    return parser.parse_args(argv)


class Ours:
    """reftune's LoReFT on the same random Llama, with given W, b and R.

    Args:
        settings: Model and batch.
        weights: W, b and R of every layer.
        lr: Learning rate of AdamW; no weight decay.
        fixed_rotation: Keep R as it is.
    """

    def __init__(
        self, settings: Any, weights: list[dict[str, Any]], lr: float, fixed_rotation: bool
    ) -> None:
        import torch
        from harness import checksum, random_batch, random_llama

        import reftune

        self.settings, self.batch = settings, random_batch(settings)
        base = random_llama(settings)
        self.checksum = checksum(base)
        config = reftune.ReftConfig(
            reftune.LoreftConfig(rank=settings.rank),
            layers="all",
            positions=f"f{settings.prefix}+l{settings.suffix}",
        )
        self.model = reftune.get_peft_model(base, config).train()
        self.take(weights, fixed_rotation)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)

    def take(self, weights: list[dict[str, Any]], fixed_rotation: bool) -> None:
        """Take over W, b and R, layer by layer."""
        import torch

        with torch.no_grad():
            for module, values in zip(self.interventions(), weights, strict=True):
                module.reft_weight.copy_(values["W"])
                module.reft_bias.copy_(values["b"])
                module.reft_rotation.copy_(values["R"] / 2)  # its QR is R; see the head
                module.reft_rotation.requires_grad_(not fixed_rotation)

    def interventions(self) -> list[Any]:
        """Return the intervention of every layer."""
        from reftune.interventions.loreft import Loreft

        return [module for module in self.model.modules() if isinstance(module, Loreft)]

    def decay(self, lr: float, weight_decay: float) -> float:
        """Take one AdamW step with zero gradients; return the largest change of any R."""
        import torch

        def rotations() -> list[Any]:
            with torch.no_grad():
                return [module.rotation().clone() for module in self.interventions()]

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        before = rotations()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        return max(float((a - b).abs().max()) for a, b in zip(before, rotations(), strict=True))

    def logits(self) -> Any:
        """Return the logits at label positions."""
        import torch

        self.model.eval()
        with torch.no_grad():
            logits = self.model(**self.batch).logits[self.batch["labels"] != -100]
        self.model.train()
        return logits

    def base_logits(self) -> Any:
        """Return the same without the adapter."""
        with self.model.disable_adapter():
            return self.logits()

    def losses(self, steps: int, batches: int) -> list[float]:
        """Train on a few batches in turn; return the loss of each step."""
        from harness import random_batch
        from torch.nn import functional as F

        from reftune.model.run import Prepared, Runner

        runner = Runner(self.model)
        turn = [Prepared(**random_batch(self.settings, seed)) for seed in range(batches)]
        found = []
        for index in range(steps):
            output = runner(turn[index % batches])
            loss = F.cross_entropy(output.logits.float(), output.labels)
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            found.append(loss.item())
        return found


def compare_logits(python: str, settings: Any, folder: Path) -> dict[str, Any]:
    """Compare the edited logits, and say how much the edit changes them at all."""
    import torch
    from worker_client import Worker

    with Worker(python, settings) as theirs:
        theirs.ask("weights", path=str(folder / "weights.pt"))
        theirs.ask("logits", path=str(folder / "logits.pt"))
        ours = Ours(settings, torch.load(folder / "weights.pt"), 0.0, False)
        require_equal_base(ours, theirs)
    logits = ours.logits()
    difference = float((logits - torch.load(folder / "logits.pt")).abs().max())
    effect = float((logits - ours.base_logits()).abs().max())
    return row("logits", settings, difference, LOGITS, effect_of_the_edit=effect)


def compare_decay(python: str, settings: Any, folder: Path) -> dict[str, Any]:
    """Compare what one decayed step without gradients does to R."""
    import torch
    from worker_client import Worker

    step = {"lr": 1e-3, "weight_decay": 0.1}
    with Worker(python, settings) as theirs:
        theirs.ask("weights", path=str(folder / "weights.pt"))
        ours = Ours(settings, torch.load(folder / "weights.pt"), 0.0, False)
        norms = theirs.ask("decay", **step)
    before, after = max(norms["before"]), max(norms["after"])
    note = f"pyreft: norm of R {before:.3f} before, {after:.3f} after"
    return row("weight_decay", settings, ours.decay(**step), DECAYED, note=note, **step)


def compare_losses(
    args: argparse.Namespace, settings: Any, folder: Path, fixed: bool
) -> dict[str, Any]:
    """Compare two loss curves from equal init."""
    import torch
    from worker_client import Worker

    batches = 4
    started = time.perf_counter()
    with Worker(args.pyreft_python, settings, lr=args.lr, fixed_rotation=fixed) as theirs:
        theirs.ask("weights", path=str(folder / "weights.pt"))
        ours = Ours(settings, torch.load(folder / "weights.pt"), args.lr, fixed)
        require_equal_base(ours, theirs)
        expected = theirs.ask("losses", steps=args.steps, batches=batches)["losses"]
    found = ours.losses(args.steps, batches)
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    fell = expected[0] - min(expected)
    value, bar = (worst, FIXED) if fixed else (worst / fell, TRAINED)
    name = "losses, R fixed" if fixed else "losses, R trained, share of the fall"
    more = {"first": [found[0], expected[0]], "last": [found[-1], expected[-1]]}
    seconds = time.perf_counter() - started
    return row(name, settings, value, bar, steps=args.steps, fell=fell, seconds=seconds, **more)


PEER: dict[str, str] = {}
"""Versions of pyreft and pyvene, once a comparison has run."""


def require_equal_base(ours: Ours, theirs: Any) -> None:
    """Check that both processes built the same random model; note pyreft's versions."""
    from worker_client import WorkerError

    PEER.update({name: theirs.versions[name] for name in ("pyreft", "pyvene")})

    if abs(ours.checksum - theirs.checksum) > 1e-9 * abs(ours.checksum):
        raise WorkerError(
            "The two environments build different random weights. Use the same torch and "
            "transformers versions in both."
        )


def row(name: str, settings: Any, value: float, bar: float, **more: Any) -> dict[str, Any]:
    """Return one result."""
    return {
        "name": name,
        "d": settings.shape,
        "value": value,
        "bar": bar,
        "holds": value <= bar,
    } | more


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; 1 if a bar is missed or pyreft cannot run."""
    args = arguments(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    import torch
    import transformers
    from harness import Settings, command
    from worker_client import WorkerError

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    shapes = args.d[:1] if args.quick else args.d
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in shapes:
            settings = Settings(
                shape=shape, rows=4, width=64, num_labels=8, threads=args.threads, ragged=True
            )
            try:
                rows.append(compare_logits(args.pyreft_python, settings, folder))
                rows += [compare_losses(args, settings, folder, fixed) for fixed in (True, False)]
                rows.append(compare_decay(args.pyreft_python, settings, folder))
            except WorkerError as error:
                print(f"Error: {error}", file=sys.stderr)
                return 1
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, **PEER}
    result = {"rows": rows, "settings": asdict(settings), "versions": versions}
    if args.publish:
        from reftune.report.measured import publish_measured

        publish_measured(result, "parity", command("benchmarks/parity_pyreft.py", argv))
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for found in rows:
            mark = "holds" if found["holds"] else "MISSED"
            more = {
                k: v for k, v in found.items() if k not in ("name", "d", "value", "bar", "holds")
            }
            what = f"d={found['d']:<5}{found['name']:<38}"
            print(f"{mark:>7}  {what}{found['value']:.2e} (bar {found['bar']:.0e})  {more}")
    return 0 if all(found["holds"] for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
