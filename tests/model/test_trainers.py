"""transformers' Trainer and TRL take adapters as they are."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import build, pad, rows
from contracts.helpers import interventions
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer

from reftune import LoreftConfig, ReftConfig, get_peft_model
from reftune.errors import PositionError
from reftune.model.adapters import sites

CONFIG = {"positions": "f2+l2"}


def data(count=8):
    items = []
    for row in rows(tuple(7 + i % 3 for i in range(count)), seed=1):
        labels = row.clone()
        labels[:4] = -100
        items.append({"input_ids": row.tolist(), "labels": labels.tolist()})
    return items


def collate(items):
    ids, mask = pad([torch.tensor(i["input_ids"]) for i in items])
    labels, _ = pad([torch.tensor(i["labels"]) for i in items], value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer(folder, model=None, callbacks=None, **kwargs):
    from transformers import Trainer, TrainingArguments

    values = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.02, "seed": 3,
        "report_to": [], "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
        "eval_steps": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, **kwargs,
    }  # fmt: skip
    if model is None:
        torch.manual_seed(0)
        model = get_peft_model(build("llama"), ReftConfig(LoreftConfig(rank=2), **CONFIG))
    return Trainer(
        model, TrainingArguments(str(folder), **values), data_collator=collate, callbacks=callbacks,
        train_dataset=data(), eval_dataset=data(4),
    )  # fmt: skip


def weights(model):
    return [p.detach().clone() for m in interventions(model) for p in m.parameters()]


@pytest.mark.quick
def test_trainer_learns_and_loads_the_best(tmp_path):
    run = trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    scores = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(scores.values())
    assert run.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


def test_resume_gives_the_weights_of_an_uninterrupted_run(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts")
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    first.add_callback(Stop())
    first.train()
    second = trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for a, b in zip(weights(whole.model), weights(second.model)):
        assert torch.equal(a, b)


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(PositionError, match="label smoothing drops them"):
        trainer(tmp_path, label_smoothing_factor=0.1).train()


def test_gradient_checkpointing_in_trainer_changes_nothing(tmp_path):
    plain = trainer(tmp_path / "a", max_steps=2)
    plain.train()
    for reentrant in (False, True):
        run = trainer(
            tmp_path / str(reentrant), max_steps=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        run.train()
        for a, b in zip(weights(plain.model), weights(run.model)):
            assert torch.allclose(a, b, atol=1e-6)


def test_an_intervention_mask_column_reaches_the_model(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), ReftConfig(LoreftConfig(rank=2), positions="mask"))
    run = trainer(tmp_path, model, max_steps=2, remove_unused_columns=False, eval_strategy="no")

    def with_mask(items):
        batch = collate(items)
        batch["intervention_mask"] = batch["labels"] != -100
        return batch

    run.data_collator = with_mask
    before = weights(model)
    run.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model)))


# TRL


def folder_model():
    torch.manual_seed(0)
    return tiny_llama(), tiny_tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_trl_sft_takes_the_config(tmp_path, packing):
    trl = pytest.importorskip("trl")
    model, tokenizer = folder_model()
    dataset = Dataset.from_list(
        [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}."} for i in range(16)]
    )
    seen = []
    args = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        packing=packing, max_length=64, learning_rate=0.02, disable_tqdm=True, bf16=False,
        logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip
    run = trl.SFTTrainer(
        model, args=args, train_dataset=dataset, processing_class=tokenizer,
        peft_config=ReftConfig(LoreftConfig(rank=2), positions="f1+l1"),
    )  # fmt: skip
    site = sites(run.model)[0]
    block = run.model.get_base_model().model.layers[0]
    block.register_forward_hook(lambda *a: seen.append(_places(site.call.now)))
    before = weights(run.model)
    run.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(run.model)))
    assert len(seen) == 3
    for prompts, edited in seen:
        assert edited == 2 * prompts > 0, "a first and a last token of each prompt"
    assert packing == any(prompts > 4 for prompts, _ in seen), "rows hold several documents"


def _places(now):
    """Return the number of documents of a pass and of its edited tokens."""
    (found,) = {id(v): v for v in now.places.values()}.values()
    _, weights_ = found
    edited = int(sum(w.sum() for w in weights_.values()))
    documents = int((now.tokens.place == 0)[now.tokens.valid].sum())
    return documents, edited


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_trl_grpo_takes_the_config_and_its_reference_is_the_base(tmp_path, beta):
    trl = pytest.importorskip("trl")
    model, tokenizer = folder_model()
    dataset = Dataset.from_list([{"prompt": f"{i} plus {i} is"} for i in range(8)])
    args = trl.GRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, beta=beta,
        max_completion_length=6, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        learning_rate=0.05, gradient_checkpointing=False,
    )  # fmt: skip
    config = LoreftConfig(rank=2, init="identity")
    run = trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=args, train_dataset=dataset, processing_class=tokenizer,
        peft_config=ReftConfig(config, positions="f1+l2"),
    )  # fmt: skip
    assert run.ref_model is None
    off = []
    block = run.model.get_base_model().model.layers[0]
    site = sites(run.model)[0]
    block.register_forward_hook(lambda *a: off.append(site._disable_adapters))
    before = weights(run.model)
    run.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(run.model)))
    assert any(off) == (beta > 0), "with a KL term the reference pass runs with the sites off"
