"""Row-level privacy with dropout on: a row's masks are its own, whatever else is in the batch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import ModelError
from silotune.core.seeds import derive
from silotune.core.tree import subtract
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig, quiet_libraries
from silotune.models.loading import load_model, read_adapter, write_adapter
from silotune.privacy.noise import secure_seeds, seeded_seeds
from silotune.privacy.record_level import RowGuard
from silotune.privacy.row_dropout import RowDropout
from silotune.training.loop import TrainConfig, train
from silotune.training.row_gradient_check import check_row_gradients
from silotune.training.tasks.classify import classify
from silotune.training.tasks.instruct import INSTRUCT
from tests.tiny_encoders import build_tiny_encoder

CLIP = 0.01
SGD = TrainConfig(optimizer="sgd", batch_size=4, local_steps=1, clip_norm=0)


def quiet(shape, std):
    return torch.zeros(tuple(shape), dtype=torch.float64)


class KeyedGuard(RowGuard):
    """No noise, and masks that follow from the row, the step and the call: the proof's coupling."""

    def __init__(self, steps) -> None:
        super().__init__(
            clip_norm=CLIP, noise_multiplier=0.0, lot_size=1.0, noise=quiet, seeds=secure_seeds
        )
        self.passes = iter([(n, rows) for n, step in enumerate(steps) for rows in step])

    def dropout(self, num_rows):
        step, rows = next(self.passes)
        assert len(rows) == num_rows
        calls = itertools.count()

        def draw(count):
            call = next(calls)
            return [derive(0, step, row, call) for row in rows]

        return RowDropout(num_rows, draw)


class StreamGuard(RowGuard):
    """The fault that this file remembers: masks by place, from the stream of the forward pass."""

    def __init__(self, steps) -> None:
        super().__init__(
            clip_norm=CLIP,
            noise_multiplier=0.0,
            lot_size=1.0,
            noise=quiet,
            seeds=lambda count: [3] * count,
        )

    def dropout(self, num_rows):
        return torch.enable_grad()


@pytest.fixture(scope="module", params=["instruct", "instruct, 0.3", "classify"])
def case(request, tiny_model, tmp_path_factory):
    """LoRA's dropout in a decoder; BERT's, of hidden values and of attention, in an encoder."""
    kind, _, rate = request.param.partition(", ")
    adapter = AdapterConfig(rank=2, alpha=4, dropout=float(rate or 0.075))
    if kind == "instruct":
        config = ModelConfig(name=str(tiny_model), dtype="float32")
        adapter = adapter.model_copy(update={"targets": ("q_proj", "v_proj")})
        loaded, task = load_model(config, adapter, seed=1, device="cpu"), INSTRUCT
        rows = [
            (
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "ab" * (1 + 3 * i)},
            )
            for i in range(6)
        ]
    else:
        with quiet_libraries():
            model = build_tiny_encoder(tmp_path_factory.mktemp("bert") / "m", "bert")
        config = ModelConfig(name=str(model), dtype="float32")
        loaded = load_model(config, adapter, seed=1, device="cpu", labels=("no", "yes"))
        task = classify(("no", "yes"))
        # of one length: BERT's masks of attention depend on how far a row is padded
        rows = [{"text": "abcdefgh"[i:] + "xyzuvwst"[:i], "label": "yes"} for i in range(6)]
    gen = torch.Generator().manual_seed(9)
    start = {n: torch.randn(t.shape, generator=gen) * 0.1 for n, t in read_adapter(loaded).items()}
    return loaded, task, task.prepare(rows, loaded.tokenizer, 128).examples, start


def length(tensors) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def sum_of(case, steps, kind=KeyedGuard):
    """Minus the sum of all steps' clipped gradients, through the whole local loop."""
    loaded, task, examples, start = case
    write_adapter(loaded, start)
    batches = [[task.collate([examples[i] for i in rows]) for rows in step] for step in steps]
    context, rule = LocalContext(dict(start), {}, {}), LocalRule()
    train(
        loaded, batches, task, SGD, rule, context,
        round_=1, lr=1.0, seed=3, guard=kind(steps),
    )  # fmt: skip
    return subtract(read_adapter(loaded), start)


ALL = [[0, 1, 2, 3], [4, 5]]


def without(row):
    left = [n for n in range(6) if n != row]
    return [left[:4], left[4:]]


def test_with_dropout_a_row_moves_a_step_by_its_clipped_gradient_and_nothing_else(case):
    whole = sum_of(case, [ALL])
    for row in range(6):
        moved = subtract(whole, sum_of(case, [without(row)]))
        alone = sum_of(case, [[[row]]])
        assert length(alone) == pytest.approx(CLIP, rel=1e-4)
        assert length(subtract(moved, alone)) < 1e-3 * CLIP


def test_masks_by_place_move_a_step_by_more_than_the_bound(case):
    """1.1 to 1.6 clip norms here: otherwise the test above could not fail."""
    whole = sum_of(case, [ALL], StreamGuard)
    moved = [length(subtract(whole, sum_of(case, [without(r)], StreamGuard))) for r in range(6)]
    assert max(moved) > 1.05 * CLIP


def test_a_row_in_one_step_leaves_the_masks_of_later_steps_as_they_are(case):
    """What remains is that the later step starts from another adapter."""

    def moved(kind):
        def later(rows):
            first, second = [rows], [[0, 1, 2]]
            return subtract(sum_of(case, [first, second], kind), sum_of(case, [first], kind))

        return length(subtract(later([3, 4]), later([3])))

    assert moved(KeyedGuard) < 0.2 * CLIP
    assert moved(StreamGuard) > 0.4 * CLIP


def test_secret_masks_are_new_in_every_run_and_those_of_seeded_noise_are_not(case):
    def kept(seeds):
        class Kept(RowGuard):
            def __init__(self, steps) -> None:
                super().__init__(
                    clip_norm=CLIP, noise_multiplier=0.0, lot_size=1.0, noise=quiet, seeds=seeds
                )

        return sum_of(case, [ALL], Kept)

    assert length(subtract(kept(secure_seeds), kept(secure_seeds))) > 1e-3 * CLIP
    one, two = (kept(seeded_seeds(torch.Generator().manual_seed(5))) for _ in range(2))
    assert length(one) > 0
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_training_with_row_masks_leaves_pytorchs_stream_as_it_was(case):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    sum_of(case, [ALL])
    assert torch.equal(torch.rand(3), expected)


# --- what is drawn --------------------------------------------------------------------------------


def masks(num_rows, seeds, value=None, **more):
    value = torch.ones(num_rows, 50, 8) if value is None else value
    with RowDropout(num_rows, seeds):
        return F.dropout(value, 0.5, **more)


def test_rows_and_calls_have_masks_of_their_own():
    one, two = masks(3, secure_seeds), masks(3, secure_seeds)
    drawn = [*one, *two]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    kept = torch.stack(drawn) > 0
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.stack(drawn).unique().tolist() == [0.0, 2.0]


def test_a_rows_mask_does_not_depend_on_its_place_or_its_neighbours():
    own = {row: derive(0, row) for row in range(4)}
    alone = [masks(1, lambda count, row=row: [own[row]])[0] for row in range(4)]
    mixed = masks(3, lambda count: [own[row] for row in (2, 0, 3)])
    for place, row in enumerate((2, 0, 3)):
        assert torch.equal(mixed[place], alone[row])


def test_attention_is_dropped_row_by_row_with_each_rows_mask():
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 4, generator=gen) for _ in range(3))
    mask = torch.rand(3, 1, 5, 5, generator=gen) > 0.2
    mask |= torch.eye(5, dtype=torch.bool)
    seeds = [11, 12, 13]
    with RowDropout(3, lambda count: seeds):
        together = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.4)
    for row, seed in enumerate(seeds):
        own = slice(row, row + 1)
        with RowDropout(1, lambda count, seed=seed: [seed]):
            alone = F.scaled_dot_product_attention(q[own], k[own], v[own], mask[own], 0.4)
        torch.testing.assert_close(together[own], alone)
    still = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with RowDropout(3, secure_seeds):
        assert not torch.allclose(F.scaled_dot_product_attention(q, k, v, mask, 0.4), still)
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), still)


def test_dropout_that_is_off_draws_nothing():
    def refuse(count):
        raise AssertionError("drawn")

    assert torch.equal(masks(2, refuse, training=False), torch.ones(2, 50, 8))
    with RowDropout(2, refuse):
        F.dropout(torch.ones(2, 3), 0.0)
        torch.dropout(torch.ones(2, 3), 0.5, False)


# --- models whose draws are not a row's own -------------------------------------------------------


def test_a_private_round_checks_a_model_with_its_dropout_on(case):
    loaded, task, _, start = case
    write_adapter(loaded, start)
    check_row_gradients(loaded, task, loaded.parameters)
    assert not loaded.model.training


class Drawing(torch.nn.Module):
    """A layer that draws in training mode, in one of the ways that are refused."""

    def __init__(self, inner, kind):
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, hidden):
        out = self.inner(hidden)
        if not self.training:
            return out
        if self.kind == "layer dropout":
            return out * float(torch.rand([]) < 2)
        if self.kind == "a mask of its own":
            return out * torch.bernoulli(torch.full_like(out, 0.5))
        return out * F.dropout(torch.ones(7, 1), 0.1).mean()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("layer dropout", "random numbers other than dropout masks"),
        ("a mask of its own", "random numbers other than dropout masks"),
        ("a mask that rows share", r"dropout of a tensor of shape \(7, 1\), which cannot be split"),
    ],
)
def test_a_model_with_another_kind_of_draw_is_refused(case, monkeypatch, kind, message):
    loaded, task, _, _ = case
    layer = next(m for n, m in loaded.model.named_modules() if n.endswith(("mlp", "intermediate")))
    parent = next(m for m in loaded.model.modules() if layer in m.children())
    (name,) = [n for n, child in parent.named_children() if child is layer]
    monkeypatch.setitem(parent._modules, name, Drawing(layer, kind))
    with pytest.raises(ModelError, match=message):
        check_row_gradients(loaded, task, loaded.parameters)


def test_masks_by_place_fail_the_check_of_every_round(case, monkeypatch):
    loaded, task, _, start = case
    write_adapter(loaded, start)
    right = RowDropout.__init__

    def by_place(self, num_rows, seeds):
        stream = seeded_seeds(torch.Generator().manual_seed(1))
        right(self, num_rows, stream)

    monkeypatch.setattr(RowDropout, "__init__", by_place)
    with pytest.raises(ModelError, match="with dropout, this model gives a wrong gradient"):
        check_row_gradients(loaded, task, loaded.parameters)
