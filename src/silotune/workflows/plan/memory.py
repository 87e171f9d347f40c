"""How much memory a recipe needs, estimated from shapes alone: no weights, no rows.

Each part says what it counts. Temporary memory inside libraries is not counted. This file does not
know messages or seconds.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from silotune.core.algorithm import Algorithm
from silotune.core.tree import size_bytes
from silotune.models.devices import pick_device
from silotune.models.loading import LoadedModel
from silotune.models.quantization import BLOCK, Quantization
from silotune.recipes.schema import RunConfig
from silotune.runtime.groups import auto_size, why_alone
from silotune.training.loop import pick_optimizer
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Batch
from silotune.training.together import MOST_TOKENS
from silotune.workflows.plan.shapes import Shapes, first_state

PROCESS_BYTES = 700_000_000
"""Python with torch, transformers and peft imported, on a CPU; measured on Linux."""
MOMENTS = {"adamw": 8.0, "sgd": 0.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}
"""Bytes that an optimizer keeps per value; 8 for any other."""
SECOND_BLOCK = 256
"""With double quantisation, how many scales of 4-bit blocks share a second scale."""


@dataclass(frozen=True)
class BatchShape:
    """The forward batch that needs the most memory."""

    num_rows: int
    length: int
    """Tokens of each row, padding included."""
    num_trained: int
    """Predictions that count in the loss."""


def widest_batch(run: RunConfig) -> BatchShape:
    """The largest batch that a recipe allows: full rows; with instruct, all tokens but one learned.

    Rows are usually shorter, and prompts are not learned, so a run usually stays below it.
    """
    rows, length = run.train.batch_size, run.train.max_length
    if run.task == "prefer":
        rows *= 2  # both answers of a pair are in one forward pass
    return BatchShape(rows, length, rows if run.task == "classify" else rows * (length - 1))


@dataclass(frozen=True)
class ClientMemory:
    """Bytes of a process that trains one client at a time, or a group of them, by part."""

    base: int
    """The frozen weights; for a quantised base, also its largest layer unpacked."""
    adapter: int
    """What is trained, in float32: values, gradients, and a copy of the received adapter, for every
    client of a group."""
    optimizer: int
    """The optimizer's moments."""
    activations: int
    """What the forward pass of one batch keeps for the backward pass."""
    logits: int
    """Scores of the vocabulary, or of the labels, for the loss, and their gradients; at least what
    one layer's backward pass takes."""
    process: int
    """The libraries; 0 on a GPU, because they are not in its memory."""

    @property
    def total(self) -> int:
        """All parts, at the moment when most of them are held."""
        return sum(vars(self).values())


def client_memory(
    run: RunConfig, shapes: Shapes, batch: BatchShape, *, num_asked: int = 1
) -> ClientMemory:
    """Estimate a training process from shapes.

    Args:
        run: The recipe.
        shapes: Its model.
        batch: One client's forward batch that needs the most memory.
        num_asked: Clients that train in a round: a group is not larger.

    Raises:
        NotImplementedError: The model does not run on the meta device, so it is unknown what its
            forward pass keeps.
    """
    values = sum(p.numel() for p in shapes.parameters.values())
    device = pick_device(run.runtime.device)
    size, num_joined = most_together(run, batch.num_rows * batch.length, num_asked)
    batch = BatchShape(num_joined * batch.num_rows, batch.length, num_joined * batch.num_trained)
    own = 4 * values if size > 1 else 0  # the model keeps an adapter beside those of the group
    optimizer, _ = pick_optimizer(run.train.optimizer, device)
    kept = kept_bytes(run, shapes, batch)
    scores = 4 * batch.num_trained * _num_classes(run, shapes)
    one_layer = (kept - scores) // _num_layers(shapes)
    activations = kept - scores
    if run.model.gradient_checkpointing:
        # every layer's input, and one layer while it is recomputed
        width = shapes.model.config.get_text_config().hidden_size
        number = 4 if run.model.quantization != "none" else _itemsize(shapes)
        inputs = _num_layers(shapes) * batch.num_rows * batch.length * width * number
        activations = min(activations, inputs + one_layer)
    return ClientMemory(
        base=base_bytes(shapes, run.model.quantization, double=run.model.double_quantization),
        adapter=own + size * (3 if run.adapter.kind != "full" else 2) * 4 * values,
        optimizer=size * round(MOMENTS.get(optimizer, 8.0) * values),
        activations=activations,
        logits=scores + max(2 * scores, one_layer),
        process=_process_bytes(device),
    )


def most_together(run: RunConfig, num_tokens: int, num_asked: int) -> tuple[int, int]:
    """How many clients a group has at most, and how many of them share its widest pass.

    Args:
        run: The recipe.
        num_tokens: Tokens of one client's widest forward batch.
        num_asked: Clients that train in a round.
    """
    wanted = run.runtime.together
    if wanted != "auto":
        return min(wanted, num_asked), min(wanted, num_asked)
    if why_alone(run, [], pick_device(run.runtime.device).type) is not None:
        return 1, 1
    size = max(1, min(auto_size(run, [1]), num_asked))  # the rows may be short
    return size, max(1, min(size, MOST_TOKENS // num_tokens))


@dataclass(frozen=True)
class ServerMemory:
    """Bytes of a process that only combines updates, by part."""

    base: int
    """The base with its adapter, loaded before the first round and after the last, not between."""
    state: int
    """The adapter and the algorithm's own state."""
    combining: int
    """The sum of the updates in float64, one update, their mean, and the next state."""
    process: int
    """The libraries."""

    @property
    def total(self) -> int:
        """The larger of the two moments."""
        return self.process + self.state + max(self.base, self.combining)


def server_memory(
    run: RunConfig, shapes: Shapes, algorithm: Algorithm, num_clients: int
) -> ServerMemory:
    """Estimate the server's process, without the server's own training."""
    state = first_state(shapes, algorithm, num_clients)
    adapter = size_bytes(state.adapter)
    held = adapter + sum(map(size_bytes, state.extra.values()))
    base = base_bytes(shapes, run.model.quantization, double=run.model.double_quantization)
    return ServerMemory(
        base=base + (0 if run.adapter.kind == "full" else adapter),
        state=held,
        combining=2 * adapter + adapter + adapter + held,
        process=PROCESS_BYTES,
    )


def base_bytes(shapes: Shapes, quantization: Quantization, *, double: bool) -> int:
    """Bytes of the weights that are not the adapter's, in the format in which they are held.

    4 bits: half a byte per weight, and a scale of 4 bytes per block of 64. With double quantisation
    the scale is 1 byte, plus 4 bytes per 256 blocks. 8 bits: a byte per weight and 4 per row. If
    layers are quantised, embeddings, output embeddings and norms stay float32.
    """
    trained = {id(p) for p in shapes.parameters.values()} if _has_adapter(shapes) else set[int]()
    packed = {} if quantization == "none" else _packed_layers(shapes)
    total, largest, seen = 0, 0, set(trained)
    for parameter in shapes.model.parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if id(parameter) not in packed:
            total += parameter.numel() * parameter.element_size()
            continue
        rows, largest = parameter.shape[0], max(largest, parameter.numel())
        blocks = -(-parameter.numel() // BLOCK)
        if quantization == "int8":
            total += parameter.numel() + 4 * rows
        else:
            scales = blocks + 4 * -(-blocks // SECOND_BLOCK) if double else 4 * blocks
            total += -(-parameter.numel() // 2) + scales
    return total + 2 * largest  # a layer is unpacked to 16 bits when it is used


def _has_adapter(shapes: Shapes) -> bool:
    return hasattr(shapes.model, "peft_config")


def _packed_layers(shapes: Shapes) -> set[int]:
    """Weights of linear layers, except output embeddings and heads."""
    plain = shapes.model.get_base_model() if _has_adapter(shapes) else shapes.model
    within = f"{plain.base_model_prefix}."
    mine = {id(p) for p in shapes.parameters.values()}
    return {
        id(module.weight)
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(within)
        and "pooler" not in name
        and id(module.weight) not in mine
        and "lora_" not in name
    }


# --- what a forward pass keeps --------------------------------------------------------------------


def kept_bytes(run: RunConfig, shapes: Shapes, batch: BatchShape) -> int:
    """Bytes that one forward pass in training keeps for the backward pass, without weights.

    The model runs on tensors without memory, and everything that it saves is counted once. As on
    real devices, attention keeps its inputs, its output and a number per query, not a full matrix.

    Raises:
        NotImplementedError: The model does not run on such tensors.
    """
    own = {StorageWeakRef(t.untyped_storage()) for t in shapes.model.parameters()}
    own |= {StorageWeakRef(t.untyped_storage()) for t in shapes.model.buffers()}
    found: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (place := StorageWeakRef(storage)) not in own:
            found[place] = storage.nbytes()
        return tensor

    shapes.model.train()
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            _Shapes(),
            torch.random.fork_rng(devices=[]),
        ):
            loss = _loss(run, shapes, batch)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise NotImplementedError(str(error)) from error
    finally:
        shapes.model.eval()
    del loss  # kept until here, so that no address is used twice
    return sum(found.values())


def _loss(run: RunConfig, shapes: Shapes, batch: BatchShape) -> Tensor:
    meta = torch.device("meta")
    ids = torch.empty(batch.num_rows, batch.length, dtype=torch.int64, device=meta)
    places = torch.empty(batch.num_trained, dtype=torch.int64, device=meta)
    if run.task == "classify":  # no mask: one of ones changes nothing and cannot be read here
        return F.cross_entropy(shapes.model(input_ids=ids).logits.float(), places)
    loaded = LoadedModel(
        shapes.model, None, meta, torch.float32, dict(shapes.parameters), kind=run.adapter.kind
    )
    real = Batch(ids, places, places, ids.numel(), mask=torch.empty(ids.shape, device=meta))
    if run.task == "prefer":
        known = torch.empty(batch.num_rows // 2, 2, device=meta)
        real = replace(real, sequences=2, reference=known)
    return build_task(run.task, cfg=run.prefer).loss(loaded, real).loss_sum


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out


class _Shapes(TorchFunctionMode):
    """Replaces what tensors without memory cannot do: read a value, and use fused attention.

    Models ask whether a mask hides nothing or whether rows have no padding: here the answer is yes.
    Without this, torch would choose the attention that keeps all pairs of tokens.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return True
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*_attended(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _attended(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return query, key, value


def _num_layers(shapes: Shapes) -> int:
    return shapes.model.config.get_text_config().num_hidden_layers


def _num_classes(run: RunConfig, shapes: Shapes) -> int:
    if run.task == "classify":
        return len(run.data.labels or ())
    return shapes.model.config.get_text_config().vocab_size


def _itemsize(shapes: Shapes) -> int:
    return next(p for p in shapes.model.parameters() if p.dim() > 1).element_size()


def _process_bytes(device: torch.device) -> int:
    return 0 if device.type == "cuda" else PROCESS_BYTES
