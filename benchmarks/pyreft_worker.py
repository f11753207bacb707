"""A process in pyreft's environment that trains its LoReFT step by step, on request.

Reads one JSON object a line, writes one a line: `build`, `step`, `peak`, `weights` and `logits` (to
a file), `decay`, `losses`, `quit`. Imports pyreft, never reftune.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from harness import (
    Settings,
    checksum,
    locations,
    peak_bytes,
    random_batch,
    random_llama,
    timed,
)


class Contender:
    """pyreft's LoReFT on every layer of a random Llama.

    Training goes its trainer's way: one call with `labels` and positions per layer, full logits.

    Args:
        settings: Model and batch.
        lr: Learning rate of AdamW; no weight decay.
        fixed_rotation: Keep R as it is.
    """

    def __init__(self, settings: Settings, lr: float = 1e-5, fixed_rotation: bool = False) -> None:
        import pyreft

        torch.set_num_threads(settings.threads)
        self.settings, self.batch = settings, random_batch(settings)
        llama = random_llama(settings)
        config = llama.config
        sites = [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": settings.rank,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=config.hidden_size,
                    low_rank_dimension=settings.rank,
                    dtype=torch.float32,
                ),
            }
            for layer in range(config.num_hidden_layers)
        ]
        self.model = pyreft.get_reft_model(llama, pyreft.ReftConfig(representations=sites))
        self.model.train()
        self.sites = list(self.model.interventions.values())
        for site in self.sites if fixed_rotation else ():
            site.rotate_layer.requires_grad_(False)
        parameters = [p for site in self.sites for p in site.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    def forward(self, batch: dict[str, torch.Tensor], with_loss: bool = True) -> Any:
        """Run the edited model."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        places = [locations(self.settings)] * len(self.sites)
        _, edited = self.model(
            inputs,
            unit_locations={"sources->base": (None, places)},
            labels=batch["labels"] if with_loss else None,
        )
        return edited

    def step(self, batch: dict[str, torch.Tensor] | None = None) -> float:
        """Train one step; return the loss."""
        loss = self.forward(batch or self.batch).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.item()

    def peak(self) -> int:
        """Return the peak bytes of one step."""
        models = [self.model.model, *self.sites]
        return peak_bytes(self.step, models, self.optimiser, self.settings.device)

    @torch.no_grad()
    def weights(self, path: str) -> None:
        """Write W `[r, d]`, b `[r]` and R `[r, d]` of every layer to a file."""
        found = [
            {
                "W": site.learned_source.weight.clone(),
                "b": site.learned_source.bias.clone(),
                "R": site.rotate_layer.weight.T.clone(),
            }
            for site in self.sites
        ]
        torch.save(found, path)

    @torch.no_grad()
    def logits(self, path: str) -> None:
        """Write the logits at label positions to a file."""
        self.model.eval()
        torch.save(
            self.forward(self.batch, with_loss=False).logits[self.batch["labels"] != -100], path
        )
        self.model.train()

    def decay(self, lr: float, weight_decay: float) -> dict[str, list[float]]:
        """Take one AdamW step with zero gradients; return the norms of each R before and after."""
        parameters = [p for site in self.sites for p in site.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        before = self.norms()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        return {"before": before, "after": self.norms()}

    @torch.no_grad()
    def norms(self) -> list[float]:
        """Return the Frobenius norm of R at every layer."""
        return [site.rotate_layer.weight.norm().item() for site in self.sites]

    def losses(self, steps: int, batches: int) -> list[float]:
        """Train on a few batches in turn; return the loss of each step."""
        turn = [random_batch(self.settings, seed) for seed in range(batches)]
        return [self.step(turn[index % batches]) for index in range(steps)]


def serve() -> None:
    """Answer requests until `quit`."""
    import transformers

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; answers must stay alone
    contender: Contender | None = None
    for line in sys.stdin:
        request = json.loads(line)
        what = request["do"]
        answer: dict[str, Any] = {"ok": what}
        if what == "quit":
            return
        if what == "build":
            from importlib.metadata import version

            options = {k: request[k] for k in ("lr", "fixed_rotation") if k in request}
            contender = Contender(Settings(**request["settings"]), **options)
            answer["checksum"] = checksum(contender.model.model)
            answer["versions"] = {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "pyreft": version("pyreft"),
                "pyvene": version("pyvene"),
            }
        elif what == "step":
            answer["seconds"] = timed(contender.step, contender.settings.device)
        elif what == "peak":
            answer["peak_bytes"] = contender.peak()
        elif what == "weights":
            contender.weights(request["path"])
        elif what == "logits":
            contender.logits(request["path"])
        elif what == "decay":
            answer |= contender.decay(request["lr"], request["weight_decay"])
        elif what == "losses":
            answer["losses"] = contender.losses(request["steps"], request["batches"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
