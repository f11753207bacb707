"""The online loop: answer, score, measure, update.

One step is one rollout with its updates. The model is in evaluation mode throughout, so nothing is
drawn at random but the answers, whose noise has keys of its own: a resumed run is bit-equal. Each
process answers its share of the questions; gradients are summed once an update, so the trajectory
does not depend on the number of processes (up to rounding).

Left out on purpose: sharded models (FSDP, DeepSpeed), fp16 with its loss scaling, and gradient
checkpointing, which transformers switches off in evaluation mode.
"""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerControl,
    TrainerState,
)

from reftune.errors import TrainingError
from reftune.model.below import parameters_below
from reftune.model.run import Runner
from reftune.model.sites import base_of
from reftune.objectives.online import Actions, OnlineObjective, Tally
from reftune.objectives.sft import Sft
from reftune.training.arguments import Split, total_steps
from reftune.training.backward import disable_input_grads
from reftune.training.collate import Collator, Order
from reftune.training.online_files import Files
from reftune.training.processes import leave_at_exit, rank, together, world_size
from reftune.training.rollouts import Rollout, Sampler, collate, prepared
from reftune.training.snapshot import Second, Snapshot, trained
from reftune.training.stacked import split_rates
from reftune.training.trainer import is_undecayed
from reftune.training.world import world_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import StageSpec
    from reftune.training.encode import Rows

log = logging.getLogger(__name__)


class OnlineTrainer:
    """Train whatever requires grad in a model with an objective on its own answers.

    Args:
        model: A model with trainable parameters.
        tokenizer: Its tokenizer.
        stage: `batch_size` questions a rollout over all processes, `micro_batch_size` rows a
            forward pass; `epochs` and `max_steps` count rollouts over the training rows.
        args: Device, seed, folder of checkpoints and trackers, from `arguments`.
        objective: What is minimised.
        rows: Encoded training rows, the annotated answers.
        sampler: Answers questions by the number of their row.
        validation: Encoded validation rows.
        score: Name and function of a metric on validation rows. `keep: best` compares it, whatever
            `keep_by` says; without one the loss of the annotated answers.
        callbacks: Callbacks of transformers' Trainer.

    Raises:
        TrainingError: If nothing is trainable, or the model is to be sharded.
    """

    plan = None
    """Of causal caching: there is none, the rows are new in each step."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        stage: StageSpec,
        args: TrainingArguments,
        objective: OnlineObjective,
        rows: Rows,
        sampler: Sampler,
        validation: Rows | None = None,
        score: tuple[str, Callable[[], float]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        if not trained(model):
            raise TrainingError(
                "The model has no trainable parameters.",
                "Add an adapter first, or load it with trainable=True.",
            )
        if _is_sharded(args):
            raise TrainingError(
                f'The objective "{objective.name}" trains on whole models only, not under FSDP or '
                "DeepSpeed.",
                "Use DDP (accelerate launch --multi_gpu), or one process.",
            )
        self.model, self.objective, self.rows, self.sampler = model, objective, rows, sampler
        self.stage, self.args = stage, args
        self.validation, self.score = validation, score
        self.collator = Collator.of(tokenizer)
        self.split = Split.of(self.stage, world_size())
        self.state = TrainerState(is_world_process_zero=rank() == 0)
        self.state.max_steps = total_steps(self.stage, len(rows))
        self.state.num_train_epochs = math.ceil(self.stage.epochs)
        self.control, self.tokens_seen = TrainerControl(), 0  # tokens since the start or resume
        found = [DefaultFlowCallback(), *callbacks]
        for tracker in get_reporting_integration_callbacks(args.report_to):
            found.append(tracker())
        self.callback_handler = CallbackHandler(found, model, tokenizer, None, None)
        disable_input_grads(model)
        self.world = world_of(args.device)
        if self.world.size > 1:
            leave_at_exit()

    @property
    def steps_per_epoch(self) -> int:
        """Rollouts over the training rows."""
        return math.ceil(len(self.rows) / self.stage.batch_size)

    def train(self, resume_from_checkpoint: bool = False) -> TrainerState:
        """Train, and leave the model as a model to generate with.

        Args:
            resume_from_checkpoint: Continue from the newest complete checkpoint, if there is one.

        Returns:
            The state: steps done, and the history of log lines.
        """
        together()  # the main process may have cleared the folder
        try:
            self._set_up(resume_from_checkpoint)
            self._call("on_train_begin")
            if self.state.global_step == 0:
                self._evaluate()
            while self.state.global_step < self.state.max_steps:
                self._step()
            self._call("on_train_end")
            if self.stage.keep == "best":
                self.files.take_best()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"Out of device memory at step {self.state.global_step + 1} with "
                f"{self.split.micro} rows a forward pass.",
                "Lower micro_batch_size (the result stays the same), generation_batch or max_len, "
                "or use precision: bf16.",
            ) from error
        finally:
            self.model.eval()
        return self.state

    # Start

    def _set_up(self, resume: bool) -> None:
        """Place the model; make head, optimiser, schedule and snapshot; load a checkpoint."""
        model, args, objective = self.model, self.args, self.objective
        model.to(args.device).eval()
        self.run = Runner(model)
        objective.head = self._head()
        self.trained = trained(model)
        heads = {} if objective.head is None else dict(objective.head.named_parameters())
        self.parameters = {**self.trained, **{f"head.{name}": p for name, p in heads.items()}}
        second = Second(model) if objective.wants_second else None
        if second is not None:
            objective.second = second.swapped
            self.parameters |= {f"second.{name}": p for name, p in second.parameters.items()}
        low = {p.dtype for p in self.trained.values()} - {torch.float32, torch.float64}
        if low:
            log.warning(
                "trained weights are %s: small steps round to none. Use model.dtype: float32 with "
                "precision: bf16",
                *low,
            )
        self.optimizer = self._optimizer()
        warmup = math.ceil(self.stage.optimiser.warmup * self.state.max_steps)
        self.schedule = get_scheduler(
            self.stage.optimiser.schedule, self.optimizer, warmup, self.state.max_steps
        )
        self.snapshot = Snapshot(model) if objective.reference else None
        self.order = Order(len(self.rows), 1, self.args.seed, self._epoch)
        self.files = Files(self)
        self.files.start(resume)
        objective.bind(self.trained)

    def _epoch(self) -> int:
        return self.state.global_step // self.steps_per_epoch

    def _head(self) -> nn.Module | None:
        """Draw the objective's head from the seed."""
        dim = base_of(self.model).get_output_embeddings().weight.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            head = self.objective.make_head(dim)
        return None if head is None else head.to(self.args.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over all that is trained; R and vectors are never decayed."""
        spec, named = self.stage.optimiser, self.parameters
        plain = {name for name, p in named.items() if is_undecayed(name, p)}
        groups = [
            {"params": [p for n, p in named.items() if n not in plain]},
            {"params": [p for n, p in named.items() if n in plain], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=spec.lr,
            betas=tuple(spec.betas),
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=torch.cuda.is_available(),
        )
        if spec.below_lr is not None:
            places = parameters_below(self.model)
            below = {id(named[n]) for m in places for n in (m, f"second.{m}") if n in named}
            split_rates(optimizer, below, spec.below_lr)
        return optimizer

    # Steps

    def _step(self) -> None:
        """Do one rollout with its updates, and what is due after it."""
        rollouts = self.sampler(self._questions(), self.state.global_step)
        batches = self._batches(rollouts)
        with torch.no_grad(), self._autocast():
            tally = self.objective.experience(self.run, self._reference, batches, self.world)
        norms = [self._update(batches, tally) for _ in range(self.objective.config.updates)]
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        rate = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self._call("on_step_end")
        tally.add("tokens", sum(len(rollout.row) for rollout in rollouts), 0)
        metrics = self._gathered(tally)
        self.tokens_seen += int(metrics.pop("tokens"))
        norm = sum(norms) / len(norms)
        self._log({**metrics, "grad_norm": norm, "learning_rate": rate})
        self.objective.watch(metrics)
        self._due()

    def _questions(self) -> list[int]:
        """Return this process's share of the rows of the current step."""
        size, place = self.stage.batch_size, self.state.global_step % self.steps_per_epoch
        chosen = list(self.order)[place * size : (place + 1) * size]
        share = math.ceil(len(chosen) / self.world.size)
        return chosen[rank() * share : (rank() + 1) * share]

    def _batches(self, rollouts: Sequence[Rollout]) -> list[Actions]:
        micro, gold = self.split.micro, self.objective.gold
        return [
            collate(rollouts[start : start + micro], self.collator, self.args.device, gold)
            for start in range(0, len(rollouts), micro)
        ]

    def _update(self, batches: Sequence[Actions], tally: Tally) -> float:
        """Take one optimiser step on the whole rollout; return the norm of its gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        counts = self.world.lists([self.objective.count(batch).cpu() for batch in batches])
        items = torch.stack(counts).sum(0)
        for batch in batches:
            with self._autocast():
                out = self.objective(self.run, batch, items)
            value = float(out.loss.detach())
            self._check_finite("loss", value)
            out.loss.backward()
            tally.add("loss", value, 0)
            for name, mean in out.metrics.items():
                tally.add(name, float(mean) * batch.num_rows, batch.num_rows)
        tally.add("loss", 0.0, 1 / self.world.size)
        self._reduce_gradients()
        limit = self.stage.optimiser.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))
        self._check_finite("gradient norm", norm)
        self.optimizer.step()
        for name, value in self.objective.after_step().items():
            tally.add(name, value, 1)
        return norm

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the precision of forward passes; the same for measuring and for updating."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        raise TrainingError(
            f"The {what} is {value} at step {self.state.global_step + 1} (learning rate "
            f"{self.schedule.get_last_lr()[0]:.3g}). The run stopped; no checkpoint was written "
            "from it.",
            "Lower optimiser.lr or updates, or set precision: fp32; then start again, or --resume "
            "from the last checkpoint.",
        )

    # Processes

    def _reference(self) -> AbstractContextManager[None]:
        """Return the context of the frozen policy; without one the model is its own."""
        return nullcontext() if self.snapshot is None else self.snapshot.swapped()

    def _reduce_gradients(self) -> None:
        """Sum gradients over processes; one that had no rows brings zeros."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.world.sum(parameter.grad)

    def _gathered(self, tally: Tally) -> dict[str, float]:
        """Return the means of metrics over all processes."""
        whole = Tally()
        whole.merge(self.world.lists([tally.sums]))
        return whole.means()

    # What is due after a step

    def _due(self) -> None:
        """Evaluate and save where the stage wants it, and at the end."""
        step, last = self.state.global_step, self.state.global_step == self.state.max_steps
        if step % (self.stage.evaluate_every or self.steps_per_epoch) == 0 or last:
            self._evaluate()
        if step % (self.stage.checkpoint_every or self.steps_per_epoch) == 0 or last:
            self.files.save()
            self._call("on_save")

    def _evaluate(self) -> None:
        """Score validation rows; random numbers are left as they were."""
        stage = self.stage
        if self.validation is None or not (stage.evaluate_every or stage.keep == "best"):
            return
        with torch.random.fork_rng(devices=[]):
            metrics = {"eval_loss": self._validation_loss()}
            if self.score is not None:
                metrics[f"eval_{self.score[0]}"] = self.score[1]()
        self._log(metrics)
        self._call("on_evaluate", metrics)
        if stage.keep != "best":
            return
        if self.score is None:
            self.files.save_best("validation_loss", metrics["eval_loss"], operator.lt)
        else:
            name = self.score[0]
            self.files.save_best(name, metrics[f"eval_{name}"], operator.gt)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Return the cross-entropy of the annotated answers, a mean over tokens."""
        loss, total, tokens = Sft(), 0.0, 0
        for start in range(0, len(self.validation), self.split.micro):
            rows = self.validation.rows[start : start + self.split.micro]
            batch = prepared(rows, self.collator, self.args.device)
            own = int(loss.count(batch))
            with self._autocast():
                total += float(loss(self.run, batch, None).loss) * own
            tokens += own
        return total / max(1, tokens)

    def _log(self, metrics: dict[str, float]) -> None:
        """Hand metrics to everything that writes or shows them."""
        if "loss" in metrics:
            metrics = {**metrics, "tokens": self.tokens_seen}
        logs = {**metrics, "epoch": self.state.epoch or 0.0}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._call("on_log", logs)

    def _call(self, event: str, *more: Any) -> None:
        getattr(self.callback_handler, event)(self.args, self.state, self.control, *more)


def _is_sharded(args: TrainingArguments) -> bool:
    """Return whether the launcher or the arguments ask for FSDP or DeepSpeed."""
    asked = [os.environ.get(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED")]
    return bool(args.fsdp or args.deepspeed or "true" in asked)
