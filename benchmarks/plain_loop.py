"""The floor: what the demo's training costs in a plain PyTorch and PEFT loop.

Written without the package: no client, no round, no aggregation, no disk. It receives batches that
are already padded, and uses the same loss (mean over the trained tokens of a batch, with the
vocabulary scored only where a token is predicted), the same optimizer and the same clipping.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class PaddedBatch:
    """The batch of one optimizer step."""

    ids: Tensor  # (batch, length)
    positions: Tensor  # (num_trained,) into batch * length
    targets: Tensor  # (num_trained,)


def build(folder: str, dtype: torch.dtype, *, rank: int, alpha: int, dropout: float, targets: list):
    """Build base and LoRA the way PEFT's own examples do."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
    )
    return get_peft_model(base, lora)


def train(model, clients: Sequence[Sequence[PaddedBatch]], lrs: Sequence[float]) -> float:
    """Train on every client's batches in turn, each from the same start. Returns wall seconds."""
    learning = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in learning]
    base = model.get_base_model()
    model.train()
    began = time.perf_counter()
    for batches, lr in zip(clients, lrs, strict=True):
        with torch.no_grad():
            for p, value in zip(learning, start, strict=True):
                p.copy_(value)
        optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=0.0)
        for batch in batches:
            hidden = base.model(input_ids=batch.ids, use_cache=False).last_hidden_state
            picked = hidden.flatten(0, 1).index_select(0, batch.positions)
            loss = F.cross_entropy(base.lm_head(picked).float(), batch.targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began
