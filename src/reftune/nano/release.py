"""A release: the decay branch of a training run, written as a folder `from_pretrained` reads."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reftune.nano.train import Run, Settings, newest, open_run, train


def decay_folder(run_dir: Path, checkpoint: Path) -> Path:
    """Return the folder of the decay branch that starts at a checkpoint."""
    return run_dir / f"decay-{checkpoint.stem.removeprefix('tokens-')}"


def decay(run_dir: Path, checkpoint: Path | None = None) -> Run:
    """Run the decay branch of a training run to its end; a broken-off one is continued.

    Args:
        run_dir: Folder of the constant-rate run. It may be training on meanwhile.
        checkpoint: Where to branch off; None takes the newest checkpoint.
    """
    source = checkpoint or newest(run_dir)
    folder = decay_folder(run_dir, source)
    if (folder / "checkpoints").is_dir() and list((folder / "checkpoints").glob("tokens-*.pt")):
        run = open_run(folder, Settings(), resume=True)
    else:
        run = open_run(folder, Settings(), decay_from=source)
        # The constant phase deletes old checkpoints; the branch must not depend on them.
        run.save()
    train(run)
    return run


def write_weights(run: Run, folder: Path) -> dict[str, Any]:
    """Write bf16 weights, configuration, tokenizer and `training.json`; return the latter.

    Args:
        run: A finished decay branch.
        folder: Target; its files are replaced one by one, each atomically.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "model": run.settings.model,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": run.tokens,
        "steps": run.step,
        "tokens_per_world": run.mix.counts,
        "settings": asdict(run.settings),
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch)
        run.model.to(torch.bfloat16).save_pretrained(new)
        run.tokenizer.save_pretrained(new)
        weights = (new / "model.safetensors").read_bytes()
        record["sha256"] = hashlib.sha256(weights).hexdigest()
        (new / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        for file in sorted(new.iterdir()):
            os.replace(file, folder / file.name)
    return record


def release(run_dir: Path, folder: Path | None = None, checkpoint: Path | None = None) -> Path:
    """Decay from the newest checkpoint and write the packaged weights; return their folder.

    Args:
        run_dir: Folder of the constant-rate run.
        folder: Where the weights go; None replaces the packaged ones of that model.
        checkpoint: Where to branch off; None takes the newest checkpoint.
    """
    from reftune.nano import WEIGHTS

    run = decay(run_dir, checkpoint)
    target = folder or WEIGHTS / run.settings.model
    write_weights(run, target)
    return target
