"""The loop: trajectories, normaliser, decay, refusals, checkpoints, resume."""

from __future__ import annotations

import errno
import math
import shutil

import pytest
import torch
from crashes import StopAt
from tiny import tiny_llama
from transformers import TrainerCallback, TrainingArguments

from reftune.errors import DataError, RecipeError, TrainingError
from reftune.objectives.base import Loss, Objective
from reftune.objectives.sft import Sft
from reftune.training import checkpoints
from reftune.training.backward import set_checkpointing
from reftune.training.trainer import ReftTrainer


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def close(a, b, tolerance=2e-5):
    return max(float((a[k] - b[k]).abs().max()) for k in a) < tolerance


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.quick
def test_accumulation_gives_the_same_trajectory(adapted, rows, trainer_for, trained, tmp_path):
    curves, ends = [], []
    for micro in (8, 2, 1):  # rows have 5 to 8 label tokens: a mean of means would differ
        model = adapted()
        trainer = trainer_for(model, rows, micro_batch_size=micro, folder=tmp_path / str(micro))
        trainer.train()
        curves.append(losses(trainer))
        ends.append(trained(model))
    for curve, end in zip(curves[1:], ends[1:]):
        assert curve == pytest.approx(curves[0], rel=1e-5)
        drift = sum(a - b for a, b in zip(curve, curves[0])) / len(curve)
        assert abs(drift) < 1e-5
        assert close(end, ends[0])


def test_first_loss_is_the_mean_over_label_tokens(adapted, rows, trainer_for, tokenizer):
    model = adapted()
    trainer = trainer_for(model, rows, batch_size=22, micro_batch_size=2, max_steps=1)
    trainer.train()
    total = count = 0.0
    fresh = adapted()
    for row in rows.rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            loss = fresh(input_ids=ids, labels=labels).loss
        n = sum(label != -100 for label in row.labels)
        total, count = total + float(loss) * n, count + n
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(adapted, rows, trainer_for, trained, tmp_path):
    plain, saved = adapted(), adapted()
    trainer_for(plain, rows, max_steps=2, folder=tmp_path / "a").train()
    trainer = trainer_for(saved, rows, max_steps=2, folder=tmp_path / "b")
    set_checkpointing(saved, True)
    trainer.train()
    assert not getattr(saved.get_base_model(), "_require_grads_hooks", [])
    assert close(trained(plain), trained(saved), 1e-6)
    set_checkpointing(saved, False)
    assert not saved.get_base_model().is_gradient_checkpointing


def test_input_gradients_are_off(adapted, rows, trainer_for):
    model = adapted()
    model.enable_input_require_grads()
    trainer_for(model, rows)
    embedded = model.get_input_embeddings()(torch.tensor([[1]]))
    assert not embedded.requires_grad


def test_decay_spares_rotation_and_biases(adapted, rows, trainer_for):
    model = adapted()
    trainer = trainer_for(model, rows, weight_decay=0.1)
    names = trainer.get_decay_parameter_names(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    decayed = trainable & set(names)
    assert decayed and all(n.endswith("reft_weight") for n in decayed)
    spared = trainable - decayed
    assert any(n.endswith("reft_rotation") for n in spared)
    assert any(n.endswith("reft_bias") for n in spared)
    wrapped = {f"module.{n}" for n in trainer.undecayed}
    assert {n.removeprefix("module.") for n in wrapped} == trainer.undecayed
    optimizer = trainer.create_optimizer()
    sizes = [(g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert sizes == [(0.1, len(decayed)), (0.0, len(spared))]


def test_r_stays_orthonormal_under_decay(adapted, rows, trainer_for):
    model = adapted()
    trainer_for(model, rows, weight_decay=0.5, lr=0.05, epochs=3).train()
    for module in model.modules():
        if hasattr(module, "rotation"):
            r = module.rotation()
            assert torch.allclose(r @ r.T, torch.eye(len(r)), atol=1e-5)


def test_the_model_comes_back_ready_to_generate(adapted, rows, trainer_for):
    model = adapted()
    assert model.config.use_cache
    trainer_for(model, rows, max_steps=1).train()
    assert model.config.use_cache and not model.training


def test_nothing_trainable(rows, trainer_for):
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameters"):
        trainer_for(model, rows)


def test_settings_that_change_what_is_trained_are_refused(adapted, tmp_path):
    def make(**values):
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **values)
        ReftTrainer(adapted(), args, Sft())

    with pytest.raises(RecipeError, match=r"label_smoothing_factor is 0\.1"):
        make(label_smoothing_factor=0.1, remove_unused_columns=False)
    with pytest.raises(RecipeError, match="remove_unused_columns"):
        make()


class Poison(Objective):
    """Cross-entropy until a step, then NaN."""

    def __init__(self, step, on="loss"):
        super().__init__()
        self.sft, self.calls, self.step, self.on = Sft(), 0, step, on

    def __call__(self, run, prepared, num_items):
        self.calls += 1
        loss = self.sft(run, prepared, num_items).loss
        if self.calls < self.step:
            return Loss(loss)
        if self.on == "loss":
            return Loss(loss * float("nan"))
        return Loss(loss + (loss - loss.detach()).abs().sqrt())  # finite, with an infinite slope


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_that_is_not_finite_stops_the_run(adapted, rows, trainer_for, trained, what):
    model = adapted()
    trainer = trainer_for(model, rows, checkpoint_every=1)
    trainer.objective = Poison(3, "loss" if what == "loss" else "gradient")
    with pytest.raises(
        TrainingError, match=rf"The {what} is .* at step 3.*learning rate"
    ) as caught:
        trainer.train()
    assert "optimiser.lr" in caught.value.remedy
    assert checkpoints.last_checkpoint(trainer.folder).name == "checkpoint-2"
    assert model.config.use_cache
    if what == "loss":
        assert all(torch.isfinite(p).all() for p in trained(model).values())


def test_out_of_memory_says_what_to_lower(adapted, rows, trainer_for):
    class Greedy(Sft):
        def __call__(self, run, prepared, num_items):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = trainer_for(adapted(), rows, micro_batch_size=4)
    trainer.objective = Greedy()
    with pytest.raises(TrainingError, match=r"step 1 with 4 rows.*Lower micro_batch_size"):
        trainer.train()


@pytest.mark.parametrize("crash", [1, 3, 4, 5])
def test_resume_is_bit_equal(adapted, rows, trainer_for, trained, tmp_path, crash):
    settings = {"checkpoint_every": 2, "micro_batch_size": 4}
    straight = adapted(dropout=0.2)
    whole = trainer_for(straight, rows, folder=tmp_path / "a", **settings)
    whole.train()
    broken = trainer_for(
        adapted(dropout=0.2), rows, folder=tmp_path / "b", callbacks=[StopAt(crash)], **settings
    )
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    resumed = adapted(dropout=0.2)
    torch.manual_seed(999)
    trainer = trainer_for(resumed, rows, folder=tmp_path / "b", **settings)
    trainer.train(True)
    assert equal(trained(straight), trained(resumed))
    assert losses(trainer) == losses(whole)


def test_resume_at_an_epoch_boundary_is_bit_equal(adapted, rows, trainer_for, trained, tmp_path):
    straight = adapted(dropout=0.2)
    trainer_for(straight, rows, folder=tmp_path / "a").train()
    broken = trainer_for(adapted(dropout=0.2), rows, folder=tmp_path / "b", callbacks=[StopAt(4)])
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    resumed = adapted(dropout=0.2)
    trainer_for(resumed, rows, folder=tmp_path / "b").train(True)
    assert equal(trained(straight), trained(resumed))


def test_validating_does_not_change_training(adapted, rows, trainer_for, trained, tmp_path):
    a, b = adapted(dropout=0.3), adapted(dropout=0.3)
    trainer_for(a, rows, folder=tmp_path / "a").train()
    trainer_for(b, rows, rows, folder=tmp_path / "b", evaluate_every=1).train()
    assert equal(trained(a), trained(b))


def test_validation_loss_is_exact_over_ragged_batches(adapted, rows, trainer_for):
    model = adapted()
    trainer = trainer_for(model, rows, rows, evaluate_every=1, batch_size=22, micro_batch_size=22)
    whole = trainer.evaluate()["eval_loss"]
    small = trainer_for(model, rows, rows, evaluate_every=1, batch_size=21, micro_batch_size=7)
    assert small.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)


class Upwards(Sft):
    """Climbs where it should descend, so that each validation is worse than the one before."""

    def __call__(self, run, prepared, num_items):
        out = super().__call__(run, prepared, num_items)
        return Loss(-out.loss if torch.is_grad_enabled() else out.loss)


def test_keep_best_ends_with_the_best_weights(adapted, rows, trainer_for):
    model = adapted()
    trainer = trainer_for(model, rows, rows, keep="best", evaluate_every=1, lr=0.05)
    trainer.objective = Upwards()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    best = min(lines, key=lambda line: line["eval_loss"])
    assert best["step"] < lines[-1]["step"], "the test needs a run that gets worse"
    assert checkpoints.best_so_far(trainer.folder)[0] == best["step"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    again = adapted()  # a new run forgets the best of an old one in the same folder
    second = trainer_for(again, rows, rows, keep="best", evaluate_every=1, max_steps=1, lr=1e-6)
    second.train()
    assert checkpoints.best_so_far(second.folder)[0] == 1


def test_best_and_evaluation_need_validation_rows(adapted, rows, trainer_for):
    with pytest.raises(DataError, match=r"keep: best needs validation rows"):
        trainer_for(adapted(), rows, keep="best")
    with pytest.raises(DataError, match=r"evaluate_every: 2 needs validation rows"):
        trainer_for(adapted(), rows, evaluate_every=2)


def test_full_disk_keeps_the_last_checkpoint(adapted, rows, trainer_for, monkeypatch):
    trainer = trainer_for(adapted(), rows, checkpoint_every=1)
    real = torch.save

    def save(value, file, *args, **kwargs):
        if trainer.state.global_step >= 2 and "optimizer" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(TrainingError, match=r"checkpoint-2: .*No space left.*--resume"):
        trainer.train()
    assert sorted(p.name for p in trainer.folder.iterdir()) == ["checkpoint-1"]
    assert (trainer.folder / "checkpoint-1" / "optimizer.pt").is_file()


def test_half_written_checkpoints_are_ignored(tmp_path):
    whole = tmp_path / "checkpoint-5"
    whole.mkdir()
    (whole / checkpoints.STATE_FILE).write_text("{}")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / checkpoints.STAGING / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoints.last_checkpoint(tmp_path) == whole
    assert checkpoints.last_checkpoint(tmp_path / "nowhere") is None


def test_old_checkpoints_are_rotated(adapted, rows, trainer_for):
    trainer = trainer_for(adapted(), rows, checkpoint_every=1)
    trainer.train()
    assert sorted(p.name for p in trainer.folder.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_objective_state_survives_a_resume(adapted, rows, trainer_for, tmp_path):
    class Counting(Sft):
        seen = 0

        def __call__(self, run, prepared, num_items):
            self.seen += 1
            return super().__call__(run, prepared, num_items)

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    first = trainer_for(adapted(), rows, max_steps=2, checkpoint_every=1)
    first.objective = Counting()
    first.train()
    second = trainer_for(adapted(), rows, max_steps=3, checkpoint_every=1)
    second.objective = Counting()
    second.train(True)
    assert second.objective.seen == 3


def test_adapter_with_another_name_resumes(rows, trainer_for, trained, tmp_path):
    from reftune.config.recipe import AdapterSpec
    from reftune.model.build import apply_adapter

    def make():
        return apply_adapter(tiny_llama(), AdapterSpec(name="mine", options={"rank": 2}), 0)

    straight, resumed = make(), make()
    trainer_for(straight, rows, folder=tmp_path / "a", checkpoint_every=2).train()
    broken = trainer_for(
        make(), rows, folder=tmp_path / "b", checkpoint_every=2, callbacks=[StopAt(3)]
    )
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    trainer_for(resumed, rows, folder=tmp_path / "b", checkpoint_every=2).train(True)
    assert equal(trained(straight), trained(resumed))


def test_subspaces_reach_the_edit(adapted, tokenizer, trainer_for, trained, sums_of):
    from reftune.training.encode import encode_all

    split = encode_all(sums_of(0, 8), tokenizer, 64)
    for row in split.rows:
        row.select = (0,)
    model = adapted()
    before = trained(model)
    trainer_for(model, split, max_steps=2).train()
    after = trained(model)
    moved = [k for k in after if k.endswith("reft_weight") and not torch.equal(before[k], after[k])]
    assert moved
    for key in moved:
        assert torch.equal(before[key][1], after[key][1])
        assert not torch.equal(before[key][0], after[key][0])


def test_bf16_autocast_trains_and_restores_the_forward(adapted, rows, trainer_for):
    model = adapted()
    trainer = trainer_for(model, rows, precision="bf16", max_steps=2)
    trainer.train()
    assert all(math.isfinite(value) for value in losses(trainer))
    logits = model(input_ids=torch.tensor([[1, 5]])).logits
    assert logits.dtype == torch.float32
    assert "forward" not in model.__dict__


def test_token_count_and_metrics_are_logged(adapted, rows, trainer_for):
    trainer = trainer_for(adapted(), rows, epochs=1, micro_batch_size=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[-1]["tokens"] == sum(len(row) for row in rows.rows)
    assert all(0 <= line["token_accuracy"] <= 1 for line in lines)


def test_an_encoder_decoder_learns(trainer_for, tokenizer, sums_of):
    from transformers import T5Config, T5ForConditionalGeneration

    from reftune.config.recipe import AdapterSpec
    from reftune.model.build import apply_adapter
    from reftune.training.encode import encode_all

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, dropout_rate=0.0,
    )  # fmt: skip
    model = apply_adapter(
        T5ForConditionalGeneration(config), AdapterSpec(options={"rank": 2}, positions="f2+l2"), 0
    )
    split = encode_all(sums_of(0, 16), tokenizer, 32, kind="seq2seq")
    trainer = trainer_for(model, split, lr=0.05, epochs=8)
    trainer.train()
    curve = losses(trainer)
    assert curve[-1] < curve[0]


def test_a_run_that_died_after_its_last_checkpoint_takes_no_step_more(
    adapted, rows, trainer_for, trained, tmp_path
):
    """A constant schedule shows a step too many; a linear one ends at rate 0 and hides it."""
    model = adapted()
    whole = trainer_for(model, rows, max_steps=4, checkpoint_every=2)
    whole.args.lr_scheduler_type = "constant"
    whole.train()
    ended = trained(model)
    resumed = adapted()
    trainer = trainer_for(resumed, rows, max_steps=4, checkpoint_every=2)
    trainer.args.lr_scheduler_type = "constant"
    result = trainer.train(True)
    assert result.global_step == 4 and trainer.state.global_step == 4
    assert equal(ended, trained(resumed)) and len(losses(trainer)) == 4


@pytest.mark.parametrize("harm", ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["deleted", "cut", "emptied"])
def test_a_damaged_checkpoint_is_passed_over(
    adapted, rows, trainer_for, trained, tmp_path, caplog, harm, how
):
    settings = {"checkpoint_every": 2, "max_steps": 6}
    straight = adapted(dropout=0.2)
    trainer_for(straight, rows, folder=tmp_path / "a", **settings).train()
    broken = trainer_for(
        adapted(dropout=0.2), rows, folder=tmp_path / "b", callbacks=[StopAt(5)], **settings
    )
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    file = next((tmp_path / "b" / "checkpoint-4").rglob(harm))
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "emptied" else file.read_bytes()[:-9])
    resumed = adapted(dropout=0.2)
    trainer_for(resumed, rows, folder=tmp_path / "b", **settings).train(True)
    assert f"{harm} " in caplog.text and "checkpoint-4 is damaged" in caplog.text
    assert equal(trained(straight), trained(resumed))


def test_a_resumed_run_says_from_which_step(adapted, rows, trainer_for, caplog):
    caplog.set_level("INFO", logger="reftune")
    with pytest.raises(RuntimeError, match="crash"):
        trainer_for(adapted(), rows, checkpoint_every=2, callbacks=[StopAt(5)]).train(True)
    assert "continuing" not in caplog.text
    trainer_for(adapted(), rows, checkpoint_every=2).train(True)
    assert "continuing at step 4" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_starts_anew(adapted, rows, trainer_for, caplog):
    trainer = trainer_for(adapted(), rows, checkpoint_every=2, callbacks=[StopAt(5)])
    with pytest.raises(RuntimeError, match="crash"):
        trainer.train()
    for place in checkpoints.list_checkpoints(trainer.folder):
        (place / "optimizer.pt").unlink()
    assert checkpoints.last_checkpoint(trainer.folder) is None
    assert caplog.text.count("is damaged") == 2 and "training starts anew" in caplog.text


# The best weights


def falls_off(adapted, rows, trainer_for, step=5):
    """Leave a run that crashed; its best weights are those of its first step."""
    stage = {"keep": "best", "evaluate_every": 1, "checkpoint_every": 2, "lr": 0.05}

    def make(*callbacks):
        trainer = trainer_for(adapted(), rows, rows, callbacks=callbacks, **stage)
        trainer.objective = Upwards()
        return trainer

    broken = make(StopAt(step))
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    assert checkpoints.best_so_far(broken.folder)[0] == 1
    return make(), broken.folder / checkpoints.BEST


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda best: (best / "best.json").write_text("{"), r"best\.json has 1 bytes of"),
        (lambda best: (best / "best.json").unlink(), r"best\.json is missing"),
        (lambda best: weights_of(best).write_bytes(b"x"), r"safetensors has 1 bytes of"),
        (lambda best: shutil.rmtree(best), "the folder is missing"),
    ],
    ids=["note", "no note", "weights", "folder"],
)
def test_damaged_best_weights_stop_a_resume_at_once(adapted, rows, trainer_for, harm, told):
    trainer, best = falls_off(adapted, rows, trainer_for)
    harm(best)
    with pytest.raises(TrainingError, match=f"best weights so far.*{told}.*--overwrite"):
        trainer.train(True)
    assert trainer.state.global_step == 0


def weights_of(folder):
    return next(folder.rglob("adapter_model.safetensors"))


def test_best_weights_damaged_during_a_run_are_not_replaced_by_the_last(adapted, rows, trainer_for):
    class Harm(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            shutil.rmtree(trainer.folder / checkpoints.BEST)

    trainer = trainer_for(adapted(), rows, rows, keep="best", evaluate_every=1, callbacks=[Harm()])
    with pytest.raises(TrainingError, match="the folder is missing"):
        trainer.train()


def test_a_note_that_is_none_is_an_error(tmp_path):
    (tmp_path / checkpoints.BEST).mkdir()
    (tmp_path / checkpoints.BEST / "best.json").write_text("[]")  # of a version without sizes
    with pytest.raises(TrainingError, match="cannot be read"):
        checkpoints.best_so_far(tmp_path)


def test_a_kill_while_the_best_weights_are_replaced_loses_nothing(adapted, rows, trainer_for):
    trainer, best = falls_off(adapted, rows, trainer_for)
    kept = weights_of(best).read_bytes()
    best.rename(best.with_name(".old-best"))  # where a kill within `publish` leaves them
    trainer.train(True)
    assert checkpoints.best_so_far(trainer.folder)[0] == 1
    assert weights_of(best).read_bytes() == kept
