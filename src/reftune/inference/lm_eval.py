"""Adapters in EleutherAI's lm-evaluation-harness (extra `eval`), as the model `reftune`.

The harness scores an answer by a plain forward pass over prompt and answer; an adapter whose
positions count from the end of the prompt must be told where that is. This model tells it.

    python -m reftune.inference.lm_eval --model reftune \\
        --model_args adapter=runs/demo/adapter --tasks arc_easy

In Python: `lm_eval.simple_evaluate(model=lm_eval_model()(adapter="runs/demo/adapter"), ...)`.

Left out on purpose: several GPUs through accelerate or tensor parallelism, and perplexity windows
with a prompt (each window's prompt is its BOS token, as in the harness).
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from reftune.errors import ReftuneError

if TYPE_CHECKING:
    from torch import nn

AUTO_BATCH = 64
"""Rows tried first with `batch_size=auto`; halved whenever they do not fit."""


@functools.cache
def lm_eval_model() -> type:
    """Return the harness's model class for adapters, registered there as `reftune`.

    Its arguments: `adapter` (an adapter, stack or run folder, or a hub name), `pretrained` (a base
    model in place of the one the adapter names, or without any adapter), `device`, `dtype`,
    `batch_size`, and those of the harness's own `hf` model that apply to a loaded model
    (`max_length`, `truncation`, `add_bos_token`, `chat_template_args` ...).

    Raises:
        ReftuneError: If lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ReftuneError(
            f"lm-evaluation-harness cannot be imported ({error}).",
            "Install the extra eval; in the source folder: pip install -e '.[eval]'.",
        ) from error

    @register_model("reftune")
    class ReftuneLM(HFLM):
        """A base model with an adapter of any kind reftune loads."""

        def __init__(
            self,
            adapter: str | None = None,
            pretrained: str | nn.Module | None = None,
            tokenizer: Any = None,
            device: str | None = None,
            dtype: str = "auto",
            batch_size: int | str = 16,
            **kwargs: Any,
        ) -> None:
            model, tokenizer = load(adapter, pretrained, tokenizer, dtype)
            if device is not None and _is_here(device):
                model.to(device)
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **kwargs)

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[Any, list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            """Return log-probability and greedy agreement of each answer."""
            asks = [_fitted(prompt, answer, self.max_length) for _, prompt, answer in requests]
            size = override_bs or self.batch_size
            size = size if isinstance(size, int) else AUTO_BATCH
            answers = _scored(self.model, self.tokenizer, asks, size, disable_tqdm or self.rank)
            for (key, _, _), answer in zip(requests, answers, strict=True):
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
            return answers

    return ReftuneLM


def load(
    adapter: str | None, pretrained: str | nn.Module | None, tokenizer: Any, dtype: str = "auto"
) -> tuple[nn.Module, Any]:
    """Return model and tokenizer for `--model_args`.

    Raises:
        ReftuneError: If neither is given, or a loaded model comes without its tokenizer.
    """
    from reftune.config.recipe import ModelSpec
    from reftune.model.build import load_base
    from reftune.model.checkpoint import load_adapter

    if adapter is None and pretrained is None:
        raise ReftuneError(
            "The harness model reftune needs an adapter or a base model.",
            "Pass --model_args adapter=FOLDER (or pretrained=NAME).",
        )
    model = pretrained
    if isinstance(pretrained, str):
        model, found = load_base(ModelSpec(name=pretrained, dtype=dtype))
        tokenizer = tokenizer or found
    if adapter is not None:
        model, found = load_adapter(adapter, model)
        tokenizer = tokenizer or found
    if tokenizer is None:
        raise ReftuneError("A loaded model needs its tokenizer.", "Pass tokenizer= beside it.")
    return model, tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Run the harness's command line with the model `reftune` known to it."""
    lm_eval_model()
    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def _is_here(device: str) -> bool:
    """Say whether a device can be used: the harness asks for cuda:0 unless told otherwise."""
    import torch

    return not device.startswith("cuda") or torch.cuda.is_available()


def _fitted(prompt: list[int], answer: list[int], max_len: int) -> Any:
    """Return the request with its prompt cut from the left; the last answer token is not run."""
    from reftune.inference.choose import Ask

    room = max(1, max_len + 1 - len(answer))
    return Ask(tuple(prompt[-room:]), tuple(answer))


def _scored(
    model: nn.Module, tokenizer: Any, asks: list[Any], batch_size: int, silent: bool | int
) -> list[tuple[float, bool]]:
    """Score the requests with a bar."""
    from tqdm import tqdm

    from reftune.inference.choose import score

    with tqdm(total=len(asks), disable=bool(silent), desc="loglikelihood requests") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total  # answers that share a row are run once
            bar.update(done - bar.n)

        scores = score(model, tokenizer, asks, batch_size=batch_size, progress=show)
    return [(found.logprob, found.greedy) for found in scores]


if __name__ == "__main__":
    try:
        main()
    except ReftuneError as failure:
        print(f"Error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
