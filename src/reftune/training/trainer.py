"""The supervised loop: transformers' Trainer with our loss, checkpoints and refusals.

From the Trainer come data loading, accumulation, mixed precision, DDP and FSDP2 through accelerate,
and resuming. Changed here: the loss is an objective behind the run seam; its normaliser counts the
whole optimiser step over all processes; R is never decayed; a loss that is not finite stops the run
before the step; checkpoints are whole or absent; the row order does not depend on how a batch is
shared out.

Left out on purpose: label smoothing, packing, model parallelism of the Trainer (`device_map`).
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from reftune.errors import TrainingError
from reftune.model.below import untrained
from reftune.model.obstacles import COMPILED, SHARDED
from reftune.model.run import Runner
from reftune.training import checkpoints
from reftune.training.arguments import check_arguments
from reftune.training.backward import disable_input_grads
from reftune.training.callbacks import KeepBest, ObjectiveSteps
from reftune.training.causal import Kept, Settings, settle
from reftune.training.collate import Collator, Order, Padded, count_tokens, prepare
from reftune.training.plan import Plan
from reftune.training.processes import leave_at_exit, with_one_label

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from reftune.model.causal import Source
    from reftune.model.run import Prepared
    from reftune.objectives.base import Objective
    from reftune.training.encode import Encoded

log = logging.getLogger(__name__)

OBJECTIVE_FILE = "objective.pt"
_WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class ReftTrainer(Trainer):
    """Train whatever requires grad in a model with an objective.

    Args:
        model: A model with trainable parameters: adapters, or itself.
        args: Training arguments; `remove_unused_columns` must be off.
        objective: What is minimised.
        train_dataset: Encoded rows.
        eval_dataset: Encoded validation rows.
        data_collator: Stacks rows; default pads with 0.
        keep_best: Whether to end with the weights that were best on validation rows.
        score: Name and function of a metric of the model on validation rows; the highest value is
            then the best, else the lowest validation loss.
        callbacks: Further callbacks.
        causal: What to do about tokens and blocks that no edit can change; default nothing.
        counting: Shows how far the store of constants is, called with (done, total).

    Raises:
        RecipeError: For settings that would silently change what is trained.
        TrainingError: If nothing is trainable.
    """

    loss_is_scaled_for_ga = True
    """The objective divides by the items of the whole step; the Trainer must not divide again."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: Objective,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Collator | None = None,
        keep_best: bool = False,
        score: tuple[str, Callable[[], float]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        causal: Settings | None = None,
        counting: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        check_arguments(args)
        if not any(p.requires_grad for p in model.parameters()):
            raise TrainingError(
                "The model has no trainable parameters.",
                "Add an adapter first, or load it with trainable=True.",
            )
        self.objective, self.keep_best, self.score = objective, keep_best, score
        self.undecayed = {n for n, p in model.named_parameters() if is_undecayed(n, p)}
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        self._runner: Runner | None = None
        self.causal, self.counting = causal or Settings("off"), counting
        self.plan: Plan | None = None
        self._source: Kept | None = None
        self._saving_to: str | None = None
        self._sums: dict[str, Real[Tensor, ""]] = {}
        self.step_metrics: dict[str, float] = {}
        self._weight: Real[Tensor, ""] | float = 0.0
        self.tokens_seen: Int[Tensor, ""] | int = 0
        self._eval_total = 0
        disable_input_grads(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or Collator(),
            train_dataset=None if train_dataset is None else Padded(train_dataset),
            eval_dataset=None if eval_dataset is None else Padded(eval_dataset),
            callbacks=[ObjectiveSteps(self), KeepBest(self), *callbacks],
        )
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        if self.accelerator.num_processes > 1:
            leave_at_exit()

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Int[Tensor, ""] | None = None,
    ) -> Any:
        """Return the objective's loss, scaled so that averaging over processes gives the sum.

        Args:
            model: The model, as accelerate wrapped it.
            inputs: A collated batch.
            return_outputs: Also return an empty dict, for callers that expect outputs.
            num_items_in_batch: Items of the whole optimiser step over all processes.

        Raises:
            TrainingError: If the loss is not finite.
        """
        prepared = prepare(self._prepare_inputs(inputs))
        own = self.objective.count(prepared)
        is_blank = self.accelerator.num_processes > 1 and not int(own)
        if is_blank:
            prepared = with_one_label(prepared)
        out = self.objective(self._run_through(model), prepared, num_items_in_batch)
        self._check_finite("loss", float(out.loss.detach()), self.state.global_step + 1)
        loss = out.loss * 0.0 if is_blank else out.loss  # a gradient of zeros, but a gradient
        if self.model.training:
            self._note(out.metrics, own)
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Int[Tensor, ""] | None]:
        """Return the batches of one optimiser step and its items over all processes."""
        if self._source is not None:
            self._source.forget()  # or the step would differ from the same one after a resume
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        items = sum(self.objective.count(prepare(batch)) for batch in batches)
        tokens = sum(count_tokens(batch) for batch in batches)
        counts = self._over_processes(torch.stack([items, tokens]).to(device))
        self.tokens_seen = self.tokens_seen + counts[1]
        return batches, counts[0]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the Trainer's estimate walks over all parameters each step and counts wrong."""
        return 0

    def _run_through(self, model: nn.Module) -> Runner:
        if self._runner is None or self._runner.model is not model:
            self._runner = Runner(model, self._source)
        return self._runner

    def _over_processes(self, counts: Real[Tensor, " counts"]) -> Real[Tensor, " counts"]:
        if self.accelerator.num_processes == 1:
            return counts
        return self.accelerator.gather(counts[None]).sum(0)

    def bind_objective(self) -> None:
        """Hand the objective the parameters that are trained, as they are now."""
        trained = {_plain_name(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        self.objective.bind(trained, sharded=self.is_fsdp_enabled)

    def _note(self, metrics: dict[str, Any], weight: Int[Tensor, ""]) -> None:
        """Add an objective's metrics (means over `weight` items) to those of this step."""
        for name, value in metrics.items():
            value = torch.as_tensor(value, device=weight.device).detach() * weight
            self._sums[name] = self._sums.get(name, 0) + value
        self._weight = self._weight + weight

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        rate = self._get_learning_rate() if self.lr_scheduler is not None else 0.0
        raise TrainingError(
            f"The {what} is {value} at step {step} (learning rate {rate:.3g}). "
            "The run stopped; no checkpoint was written from it.",
            "Lower optimiser.lr, add optimiser.warmup, or set precision: fp32 (fp16 overflows "
            "easily); then start again, or --resume from the last checkpoint.",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the objective's metrics and the token count to a step's log line.

        Raises:
            TrainingError: If the gradient is not finite (with fp16 such steps are skipped).
        """
        if "loss" in logs and "learning_rate" in logs:
            norm = logs.get("grad_norm")
            if norm is not None and self.accelerator.scaler is None:
                self._check_finite("gradient norm", float(norm), self.state.global_step)
            weight = max(float(self._weight), 1.0)
            logs |= {name: float(total) / weight for name, total in self._sums.items()}
            logs |= self.step_metrics
            logs["tokens"] = int(self.tokens_seen)
            self._sums, self._weight = {}, 0.0
        super().log(logs, start_time)

    # Rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        args = self.args
        together = args.train_batch_size * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        order = Order(len(rows), together if args.world_size > 1 else 1, seed)
        steps = math.ceil(len(rows) / (together * args.gradient_accumulation_steps))
        order.epoch = lambda: self.state.global_step // steps
        return order

    def _get_eval_sampler(self, eval_dataset: Any) -> Order:
        args = self.args
        return Order(
            len(eval_dataset),
            args.eval_batch_size * args.world_size if args.world_size > 1 else 1,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the exact mean loss over items: no batch counts for more than its share.

        Random numbers are left as they were, so that validating does not change training.
        """
        model, was_training = self.model, self.model.training
        model.eval()
        run, one = self._run_through(model), torch.ones((), device=self.args.device)
        sums = {"loss": torch.zeros((), device=self.args.device)}
        items = torch.zeros((), device=self.args.device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in dataloader:
                prepared = prepare(self._prepare_inputs(batch))
                own = self.objective.count(prepared)
                if not int(own):
                    continue
                out = self.objective(run, prepared, one)
                items += own
                sums["loss"] += out.loss.float()
                for name, value in out.metrics.items():
                    sums[name] = sums.get(name, 0) + torch.as_tensor(value).to(own.device) * own
            found = {} if self.score is None else {self.score[0]: self.score[1]()}
        if was_training:
            model.train()
        output = self._evaluated(sums, items, metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in found.items()})
        return output

    def _evaluated(
        self, sums: dict[str, Real[Tensor, ""]], items: Real[Tensor, ""], prefix: str
    ) -> EvalLoopOutput:
        if self.accelerator.num_processes > 1:  # a process may have seen blank rows only
            sums = {"loss": sums["loss"]}
        names = list(sums)
        totals = self._over_processes(torch.stack([items, *(sums[name] for name in names)]))
        means = totals[1:] / totals[0].clamp(min=1)
        metrics = {f"{prefix}_{name}": float(mean) for name, mean in zip(names, means)}
        return EvalLoopOutput(None, None, metrics, num_samples=len(self.eval_dataset or ()))

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that are decayed: matrices, but never R, biases or norms."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if _plain_name(name) not in self.undecayed]

    # Checkpoints

    @property
    def folder(self) -> Path:
        """Folder of checkpoints."""
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._saving_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        name = f"checkpoint-{self.state.global_step}"
        with checkpoints.staging(
            self.folder, f"the checkpoint {name}", self.args.should_save
        ) as to:
            self.accelerator.wait_for_everyone()
            self._saving_to = str(to)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None
            if self.args.should_save and self.objective.state_dict():
                torch.save(self.objective.state_dict(), to / name / OBJECTIVE_FILE)
            if self.args.should_save and self.plan is not None:
                self.plan.write(to / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.publish(to / name, self.folder / name)
                checkpoints.rotate(self.folder)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint or "") / OBJECTIVE_FILE
        if checkpoint and file.is_file():
            self.objective.load_state_dict(torch.load(file, weights_only=True))

    def save_best(self, name: str, value: float, is_better: Callable[[float, float], bool]) -> None:
        """Keep the current weights if their value is the best so far.

        Args:
            name: What is compared.
            value: Its value now.
            is_better: Whether the first of two values is the better one.
        """
        best = checkpoints.best_so_far(self.folder)
        if best is not None and not is_better(value, best[1]):
            return
        with checkpoints.staging(self.folder, "the best weights", self.args.should_save) as to:
            self.accelerator.wait_for_everyone()
            self.save_model(str(to / checkpoints.BEST), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.note_best(to / checkpoints.BEST, self.state.global_step, value, name)
                checkpoints.publish(to / checkpoints.BEST, self.folder / checkpoints.BEST)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, and leave the model as a model to generate with.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest complete one.
            **kwargs: What transformers' Trainer takes.

        Returns:
            transformers' TrainOutput.
        """
        if self.args.should_save:
            checkpoints.restore_best(self.folder)
        self.accelerator.wait_for_everyone()  # the main process may have cleared the folder
        if resume_from_checkpoint is True:
            last = checkpoints.last_checkpoint(self.folder)
            resume_from_checkpoint = None if last is None else str(last)
        if not resume_from_checkpoint and self.args.should_save:
            shutil.rmtree(self.folder / checkpoints.BEST, ignore_errors=True)
        try:
            if resume_from_checkpoint:
                self._go_on(Path(resume_from_checkpoint))
            if self._is_done(resume_from_checkpoint):
                return self._done(str(resume_from_checkpoint))
            self.bind_objective()
            for rows in (self.train_dataset, self.eval_dataset):
                self._inform(rows)
            self._settle(resume_from_checkpoint)
            result = super().train(resume_from_checkpoint, **kwargs)
            self._take_best()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"Out of device memory at step {self.state.global_step + 1} with "
                f"{self.args.per_device_train_batch_size} rows a forward pass.",
                "Lower micro_batch_size (the result stays the same), set gradient_checkpointing, "
                "lower max_len, or use precision: bf16.",
            ) from error
        finally:
            self._restore()
        return result

    def _go_on(self, checkpoint: Path) -> None:
        """Say from which step a run goes on, and check what it needs besides its checkpoint."""
        state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE_FILE))
        if self.keep_best:
            checkpoints.best_of(self.folder, state.log_history)
        log.info("continuing at step %d", state.global_step)

    def _is_done(self, checkpoint: str | bool | None) -> bool:
        """Say whether a checkpoint is the last of the run; the Trainer would go one step on."""
        if not checkpoint or self.args.max_steps <= 0:
            return False
        state = TrainerState.load_from_json(str(Path(checkpoint) / checkpoints.STATE_FILE))
        return state.global_step >= self.args.max_steps

    def _done(self, checkpoint: str) -> TrainOutput:
        """Take the weights of a run that ended between its last checkpoint and its artefact."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / checkpoints.STATE_FILE))
        self._load_from_checkpoint(checkpoint)
        self._take_best()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _take_best(self) -> None:
        """Put the best weights on the model, where they are kept and are not the last ones."""
        if not self.keep_best:
            return
        best = checkpoints.best_of(self.folder, self.state.log_history)
        if best is not None and best[0] != self.state.global_step:
            log.info("keeping the weights of step %d, %.4f on validation rows", *best)
            self._load_from_checkpoint(str(self.folder / checkpoints.BEST))

    def _inform(self, dataset: Padded | None) -> None:
        """Let the objective ask the untrained model about rows, once: it is the same on resume."""
        if dataset is None:
            return
        with untrained(self.model), self.accelerator.autocast():
            parts = self._parts(dataset.rows, len(dataset.rows))
            dataset.rows = self.objective.inform(parts, Runner(self.model)) or dataset.rows

    def _parts(self, rows: Any, count: int) -> Iterator[tuple[list[Encoded], Prepared]]:
        """Yield the first `count` rows some at a time, each time with the batch they make."""
        size = self.args.per_device_train_batch_size
        for start in range(0, count, size):
            part = [rows[i] for i in range(start, min(start + size, count))]
            yield part, prepare(self._prepare_inputs(self.data_collator(part)))

    def _settle(self, checkpoint: str | bool | None) -> None:
        """Decide what is held constant in this run, and compute it where it is kept."""
        rows = self.train_dataset.rows
        size = self.args.per_device_train_batch_size
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1
        compiled = COMPILED if self.args.torch_compile else None

        def batches(number: int | None) -> Iterator[Prepared]:
            count = len(rows) if number is None else min(number, len(rows))
            return (batch for _, batch in self._parts(rows, count))

        def loss(source: Source | None) -> Callable[[], Float[Tensor, ""]]:
            run, batch = Runner(self.model, source), next(batches(size))

            def compute() -> Float[Tensor, ""]:
                with self.accelerator.autocast():
                    return self.objective(run, batch, None).loss

            return compute

        state = copy.deepcopy(self.objective.state_dict())
        self.plan, self._source = settle(
            *(self.model, batches, len(rows), loss, self.causal.resumed(checkpoint)),
            around=self.accelerator.autocast,
            progress=self.counting,
            refusal=SHARDED if is_sharded else compiled,
        )
        self.objective.load_state_dict(state)  # the comparison of both paths was no step

    def _restore(self) -> None:
        self._runner = self._source = None
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        forward = self.model.__dict__.get("forward")
        if getattr(forward, "__func__", None) is type(self.model).forward:
            del self.model.forward  # accelerate leaves the class's own method on the instance
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache  # the Trainer switched it off
        self.model.eval()


def is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is never weight-decayed: R, vectors, biases."""
    return getattr(parameter, "_no_decay", False) or parameter.ndim <= 1 or name.endswith("bias")


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
