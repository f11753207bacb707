"""Recipes: everything a run depends on, as documented dataclasses.

A recipe names a model, a task and one or more stages; a stage trains one adapter with one
objective. `reftune.config.loader` reads YAML into these classes and reports all faults at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSpec:
    """The frozen base model. `model: nano` is short for `model: {name: nano}`."""

    name: str = "nano"
    """`nano` (shipped with reftune), a local folder, or a hub name such as `Qwen/Qwen3-0.6B`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights; `auto` is the checkpoint's own on CUDA, float32 elsewhere.
    Adapters always train in float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel."""
    quantize: Literal["none", "int8", "int4", "torchao_int8"] = "none"
    """Load base weights quantised (extra `quant`): `int8` and `int4` (NF4) by bitsandbytes,
    `torchao_int8` (weights alone) by torchao."""
    head: Literal["causal", "classification", "seq2seq"] = "causal"
    """Which head to load: language model, sequence classifier or encoder-decoder."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Only for sources you trust."""
    adapter: str | None = None
    """An adapter or stack folder already applied to the model before the first stage."""


@dataclass(frozen=True)
class TaskSpec:
    """Where examples come from and how they are scored. `task: gsm8k` is short for the name."""

    name: str = "own"
    """A task of `reftune methods --tasks`, or `own` for your own data."""
    data_dir: str | None = None
    """Folder with local files of a named task. Without it the hub is asked."""
    train: str | None = None
    """Own data: a JSONL, CSV or parquet file, or a hub data set name."""
    validation: str | None = None
    """Own data: rows that choose checkpoints and settings."""
    test: str | None = None
    """Own data: rows that are scored once at the end. Refused as training data."""
    prompt: str = "prompt"
    """Own data: field with the prompt, or a template such as `"Question: {question} Answer:"`."""
    completion: str = "completion"
    """Own data: field with the text to learn, or a template."""
    messages: str | None = None
    """Own data: field with chat messages (role, content); rendered by the chat template."""
    answer: str | None = None
    """Own data: field with the short gold answer; default is the completion."""
    reward: str = "exact"
    """Own data: how an answer is compared: `exact`, `numeric`, `choice`, `contains`."""
    train_size: int | None = None
    """Use the first n training rows (after a seeded shuffle)."""
    validation_size: int | None = None
    """Use at most n validation rows."""
    test_size: int | None = None
    """Use at most n test rows."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the named task, for instance `{style: prose, group: new}` for `families`."""


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained. Keys not listed here belong to the method, for instance `rank`."""

    method: str = "loreft"
    """A registered intervention, or `lora`, `full`, `head_only`."""
    layers: str | list[int] = "all"
    """`all`, `late`, a list, ranges `4-7`, negative numbers, fractions `0.5-1.0`."""
    site: str = "block"
    """`block` (block output) or a named linear module such as `mlp.up_proj`."""
    positions: str = "f5+l5"
    """Tokens to edit: `fP lS last all_prompt generated:K response subject_last all mask`."""
    train_positions: str | None = None
    """Tokens to edit while training. Default: the same."""
    short: Literal["union", "paper", "error"] = "union"
    """What to do when a prompt is shorter than the positions ask for."""
    tied: bool = True
    """One parameter set for all positions; `false`: one for prefix terms, one for suffix terms."""
    stack: Literal["auto", "encoder", "decoder"] = "auto"
    """Which side of an encoder-decoder: `auto` is the encoder, and the only stack elsewhere."""
    blocks: str | None = None
    """Dotted name of the list of blocks, as in `model.layers`, where it is not found by itself."""
    strength: float = 1.0
    """Factor on the edits: h' = h + strength · delta."""
    name: str = "default"
    """Name of the adapter on the model."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the method (rank, dropout, init ...). In YAML they stand beside `method`."""


@dataclass(frozen=True)
class OptimiserSpec:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    below_lr: float | None = None
    """Peak learning rate of the adapters below, with `below: trained`. Default: `lr`."""
    weight_decay: float = 0.0
    """Decoupled decay. Never applied to the orthonormal factor R, norms or biases."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate schedule after warm-up."""
    warmup: float = 0.0
    """Share of all steps spent warming up."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moments."""
    eps: float = 1e-8
    """AdamW epsilon."""


@dataclass(frozen=True)
class StageSpec:
    """One stage: train one adapter with one objective."""

    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    """What is trained. `adapter: red` is short for `adapter: {method: red}`."""
    objective: str = "sft"
    """A registered objective."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective."""
    optimiser: OptimiserSpec = field(default_factory=OptimiserSpec)
    """AdamW and its schedule."""
    below: Literal["frozen", "trained"] = "frozen"
    """Adapters of earlier stages: `frozen` (their dropout off, too), or `trained` with this one."""
    merge_below: bool = False
    """Hold the LoRA below in the base's weights while this stage trains: faster steps, equal up to
    rounding. The artefact keeps the two apart. Not on quantised weights."""
    epochs: float = 3.0
    """Passes over the training rows. 0 puts the adapter on for a stage with `below: trained`."""
    max_steps: int | None = None
    """Stop after this many optimiser steps instead."""
    batch_size: int = 16
    """Rows an optimiser step over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Rows a forward pass; smaller than batch_size means gradient accumulation."""
    max_len: int = 512
    """Longest row in tokens; prompts are cut from the left, targets never."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision of the forward pass; `auto` is bf16 where the base is bf16 on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    causal: Literal["auto", "off", "recompute", "store"] = "auto"
    """Tokens before the first edit are constants of a row: compute them once a step without
    gradients (`recompute`) or once a run (`store`). Exact; `auto` takes what pays."""
    causal_store: Literal["memory", "disk"] = "memory"
    """Where `store` keeps constants: host memory, or the run folder (found again on resume)."""
    causal_budget: float | None = None
    """Most GiB of constants to keep; default half of the free memory or disk."""
    checkpoint_every: int = 0
    """Save a resumable checkpoint every n steps (0: at each epoch)."""
    evaluate_every: int = 0
    """Score validation rows every n steps (0: never during training)."""
    keep: Literal["last", "best"] = "last"
    """Keep the last weights, or the best on validation rows."""
    keep_by: Literal["loss", "metric"] = "loss"
    """What `keep: best` compares: the validation loss, or the task's main metric (slower: the
    validation rows are answered greedily, or their choices compared, at each evaluation)."""


@dataclass(frozen=True)
class HeftSpec:
    """HEFT: a LoRA and a ReFT stage within one budget of epochs (Hill 2025, arXiv 2509.09801).

    It orders the two stages of the recipe and sets their `epochs`, `below` and `merge_below`, which
    they cannot name themselves. The ReFT stage starts at the identity unless it sets `init`.
    """

    epochs_total: float = 3.0
    """Passes over the training rows, both stages together."""
    coarse_fraction: float = 2 / 3
    """Share of them that LoRA gets, whatever the order. 1 is LoRA alone, 0 is ReFT alone: the same
    budget for one method. Without meaning under `joint`."""
    order: Literal["lora_first", "reft_first", "joint"] = "lora_first"
    """`lora_first` is HEFT; `reft_first` swaps the stages; `joint` trains both in one stage."""
    stage2_train: Literal["reft", "reft+lora"] = "reft"
    """What the second stage of `lora_first` trains; `reft+lora` lets LoRA go on, more slowly."""
    stage2_lora_lr: float | None = None
    """Peak learning rate of LoRA under `reft+lora`. Default: a tenth of its own."""
    merge_before_stage2: bool = False
    """Hold LoRA in the base's weights during stage 2: faster, equal up to rounding. Not on
    quantised weights. The artefact keeps the two apart."""


@dataclass(frozen=True)
class EvaluationSpec:
    """How answers are produced and scored after training."""

    split: Literal["test", "validation", "none"] = "test"
    """Rows to score; `none` skips evaluation."""
    compare_base: bool = True
    """Score the base model on the same rows too."""
    batch_size: int = 32
    """Rows a generation batch."""
    max_new_tokens: int | None = None
    """Longest answer; default is the task's own."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    top_p: float = 1.0
    """Nucleus of sampling."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is all."""
    num_beams: int = 1
    """Beams of a greedy search; more than 1 cannot be sampled from."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there before less likely."""
    no_repeat_ngram_size: int = 0
    """No run of n tokens may come twice; 0 is off."""
    samples: int = 1
    """Answers a prompt when sampling."""
    also: dict[str, TaskSpec] = field(default_factory=dict)
    """Further rows to score, by name: what differs from the run's `task`, `{new: {group: new}}`, or
    another task. Their main metric becomes the figure `<metric>_on_<name>`."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The frozen base model, or just its name."""
    task: TaskSpec = field(default_factory=TaskSpec)
    """Data and scoring, or just the name of a task."""
    stages: list[StageSpec] = field(default_factory=lambda: [StageSpec()])
    """One or more stages. A single stage may stand at the top level instead."""
    heft: HeftSpec | None = None
    """Arrange a LoRA and a ReFT stage by one budget of epochs: order, shares, what goes on."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """How answers are produced and scored after training."""
    name: str = "run"
    """Name of the run; its folder is `<output>/<name>`."""
    output: str = "runs"
    """Folder of run folders."""
    seed: int = 42
    """Seed of data order, initialisation and sampling."""
    threads: int | None = None
    """CPU threads; default is torch's own choice. Resume is bit-equal only at an equal count."""
    track: list[str] = field(default_factory=list)
    """Trackers beside metrics.jsonl: `trackio`, `wandb`, `tensorboard`."""
