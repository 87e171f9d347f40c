"""Whether a model predicts each token from the tokens before it, as all tasks but classify require.

An encoder such as BERT sees the answer that it should predict, so its loss means nothing.
"""

from typing import Any

import torch
from torch import Tensor

from silotune.core.errors import ModelError

NUM_TOKENS = 4


def check_causal(model: Any, what: str) -> None:
    """Refuse a model whose prediction after the first token depends on later tokens.

    One forward and one backward pass over four tokens. The derivative by a token that attention
    masks is exactly zero, whatever the rounding; logits could be compared only approximately.

    Args:
        model: The plain model, in evaluation mode. Not modified.
        what: The setting and its value, for messages.

    Raises:
        ModelError: It is an encoder.
    """
    embedded: list[Tensor] = []

    def watch(_module: Any, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    table = model.get_input_embeddings()
    ids = torch.arange(NUM_TOKENS, device=table.weight.device)[None] % table.weight.shape[0]
    hook = table.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            first = model(input_ids=ids).logits[0, 0].float().sum()
        slopes = torch.autograd.grad(first, embedded, allow_unused=True)
    finally:
        hook.remove()
    if any(slope is not None and bool(slope[:, 1:].any()) for slope in slopes):
        raise _reads_ahead(what)


def check_declared_causal(model: Any, what: str) -> None:
    """Refuse a model that declares itself an encoder. It may be on the meta device.

    Raises:
        ModelError: None of its attention layers is causal.
    """
    declared = {getattr(module, "is_causal", None) for module in model.modules()}
    is_decoder = getattr(model.config, "is_decoder", False)
    if False in declared and True not in declared and not is_decoder:
        raise _reads_ahead(what)


def _reads_ahead(what: str) -> ModelError:
    return ModelError(
        f"{what}: this model reads in both directions (an encoder, such as BERT), so it would see "
        "the answers that it should predict.\n"
        '  Set task = "classify", or use a model that generates text.'
    )
