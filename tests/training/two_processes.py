"""What test_train_distributed runs, alone or in each of two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_llama, tiny_tokenizer

WALKS = (("sft", 22), ("sft", 17), ("brep", 17), ("nlft", 17))
"""With 17 rows one process has no row at all in the last step of an epoch."""


def guides(i: int) -> dict:
    """Return the guides of a row; few rows have a judgment, so that a process may have none."""
    judge = {"judge": f"{i}+{i}= no:"} if i % 5 == 0 else {}
    return {"guides": {"standard": f"{i}+{i}= it is {2 * i}:", **judge}}


def walk(out: Path, micro: int, count: int, name: str = "sft") -> None:
    """Train on `count` rows, 8 a step, and save losses, weights and what the objective measured."""
    from reftune import objectives
    from reftune.config.recipe import AdapterSpec, OptimiserSpec, StageSpec
    from reftune.model.build import apply_adapter
    from reftune.tasks.base import Example
    from reftune.training.arguments import arguments
    from reftune.training.collate import Collator
    from reftune.training.encode import encode_all
    from reftune.training.processes import is_main_process, world_size
    from reftune.training.trainer import ReftTrainer

    examples = [
        Example(str(i), f"{i}+{i}=", f" {2 * i}", "", meta=guides(i) if name == "nlft" else {})
        for i in range(count)
    ]
    tokenizer = tiny_tokenizer()
    rows = encode_all(examples, tokenizer, 64)
    spec, options = AdapterSpec(options={"rank": 2}, positions="f2+l2"), {}
    if name == "brep":
        spec = AdapterSpec(method="red", site="mlp.up_proj", positions="all")
        options = {"target": 0.05, "every": 1}
    elif name == "nlft":
        options = {"sure": 0.02, "ratio": 1.05, "most_wrong": 1.0, "least": 0.0}
    model = apply_adapter(tiny_llama(), spec, 0)
    optimiser = OptimiserSpec(lr=5e-3)
    sizes = {"epochs": 2, "batch_size": 8, "micro_batch_size": micro, "evaluate_every": 2}
    stage = StageSpec(optimiser=optimiser, **sizes)
    place = f"{name}{count}"
    args = arguments(stage, out / f"ck-{place}", len(rows), seed=1, num_validation=len(rows))
    cls = objectives.get(name)
    objective = cls(cls.config_from(options))
    trainer = ReftTrainer(model, args, objective, rows, rows, Collator.of(tokenizer))
    trainer.train()
    if is_main_process():
        values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        for key in ("loss", "eval_loss", "tokens", "bias_norm", "omega", "restraint_acted"):
            found = [line[key] for line in trainer.state.log_history if key in line]
            values[key] = torch.tensor(found, dtype=torch.float64)
        values["world"] = torch.tensor(world_size())
        save_file(values, str(out / f"{place}.safetensors"))


def sharded(out: Path) -> None:
    """Take one gradient under FSDP2 by hand and save the adapter with and without shards."""
    from torch.distributed.fsdp import fully_shard

    from reftune import objectives
    from reftune.config.recipe import AdapterSpec
    from reftune.model.build import apply_adapter
    from reftune.model.checkpoint import save_adapter
    from reftune.model.run import Runner
    from reftune.tasks.base import Example
    from reftune.training.collate import Collator, prepare
    from reftune.training.encode import encode_all
    from reftune.training.processes import gathered, is_main_process, shards

    rank, count = int(os.environ["RANK"]), 4
    examples = [Example(str(i), f"{i}+{i}=", f" {2 * i}", "") for i in range(2 * count)]
    rows = encode_all(examples, tiny_tokenizer(), 64).rows
    whole = prepare(Collator()(rows))
    mine = prepare(Collator()(rows[rank * count : (rank + 1) * count]))
    spec, objective = AdapterSpec(options={"rank": 2}, positions="f2+l2"), objectives.get("sft")()
    plain, split = (apply_adapter(tiny_llama(), spec, 0).train() for _ in range(2))
    for block in split.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(split)
    assert len(shards(split)) == 3 and not shards(plain)
    items = objective.count(whole)
    objective(Runner(plain), whole, items).loss.backward()
    (objective(Runner(split), mine, items).loss * 2).backward()
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    found = {n: p.grad.full_tensor() for n, p in split.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys() and wanted
    for name, gradient in wanted.items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name
    with gathered(split):
        if is_main_process():
            save_adapter(split, out / "sharded")
            save_adapter(plain, out / "plain")


def main() -> None:
    """Walk with 22 and 17 rows, with a restraint too, then shard a model."""
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for name, count in WALKS:
        walk(out, 2, count, name)
    sharded(out)
    (out / f"done{os.environ['RANK']}").touch()


if __name__ == "__main__":
    main()
