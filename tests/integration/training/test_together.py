"""Several clients in one batch do what each would do alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import UpdateError
from silotune.models import stacked
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model, read_adapter, write_adapter
from silotune.models.stacked import why_not_stacked
from silotune.training.local_step import OwnTraining
from silotune.training.loop import TrainConfig, check_loss, train
from silotune.training.own_functions import own_loss
from silotune.training.tasks.base import Example
from silotune.training.tasks.instruct import INSTRUCT
from silotune.training.tasks.prefer import PreferConfig, prefer
from silotune.training.together import join, train_together

SMALL = AdapterConfig(rank=2, alpha=4, dropout=0.2, targets=("q_proj", "v_proj", "down_proj"))


def load(folder, adapter=SMALL, **more):
    cfg = ModelConfig(name=str(folder), dtype="float32", **more)
    return load_model(cfg, adapter, seed=1, device="cpu")


@pytest.fixture(scope="module")
def exact(tiny_model):
    """In float64, with factors that are all away from 0."""
    loaded = load(tiny_model)
    loaded.model.double()
    return replace(loaded, dtype=torch.float64)


def start_of(loaded, seed: int):
    """An adapter of a client's own, as `LocalContext.received` holds it."""
    gen = torch.Generator().manual_seed(seed)
    return {
        name: (0.3 * torch.randn(p.shape, generator=gen)).to(p.dtype)
        for name, p in loaded.parameters.items()
    }


def example(length: int, seed: int) -> Example:
    gen = torch.Generator().manual_seed(1000 * seed + length)
    trained = torch.rand(length, generator=gen) < 0.5
    trained[0], trained[-1] = False, True
    return Example(torch.randint(0, 250, (length,), generator=gen), trained)


def steps_of(shapes, seed: int = 0, task=INSTRUCT):
    """Batches of a client from the lengths of its rows: step, forward batch, row."""
    return [
        [task.collate([example(n, seed + i) for i, n in enumerate(rows)]) for rows in step]
        for step in shapes
    ]


def own(loaded, shapes, client: int, **more) -> OwnTraining:
    given = {
        "steps": steps_of(shapes, 10 * client),
        "context": LocalContext(start_of(loaded, client), {}, {}),
        "lr": 0.01,
        "seed": 100 + client,
    }
    return OwnTraining(**{**given, **more})


def alone(loaded, one: OwnTraining, cfg, rule, task=INSTRUCT, round_=1):
    """What the loop makes of one client, and its tensors in their own precision."""
    with torch.no_grad():
        for name, p in loaded.parameters.items():
            p.copy_(one.context.received[name])
    result = train(
        loaded, one.steps, task, cfg, rule, one.context, round_=round_, lr=one.lr, seed=one.seed,
        kept=one.kept, must_be_finite=False,
    )  # fmt: skip
    return result, {n: p.detach().clone() for n, p in loaded.parameters.items()}


@pytest.fixture
def full_precision(monkeypatch):
    """Trained tensors come back as they are, not in float32."""
    from silotune.training import together

    def tensors(self):
        return {n: p.detach().clone() for n, p in self.stacked.clients[self.place].items()}

    monkeypatch.setattr(together._Client, "tensors", tensors)


def check_equal(loaded, group, cfg=None, rule=None, *, task=INSTRUCT, round_=1, most=None):
    cfg = cfg or TrainConfig(local_steps=9, warmup_steps=1, weight_decay=0.01)
    rule = rule or LocalRule()
    both = train_together(loaded, group, task, cfg, rule, round_=round_, most_tokens=most)
    for one, (result, tensors) in zip(group, both, strict=True):
        want, expected = alone(loaded, one, cfg, rule, task, round_)
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-5)
            moves = rule.trains(name, round_)
            assert torch.equal(tensor, one.context.received[name]) != moves, "the check is blind"
        assert result.train_loss == pytest.approx(want.train_loss, abs=1e-6)
        assert result.penalty == pytest.approx(want.penalty, rel=1e-5)
        assert result.lr_sum == want.lr_sum
        for key in ("num_steps", "num_tokens", "num_targets"):
            assert getattr(result, key) == getattr(want, key)
        assert result.num_padded_tokens >= want.num_padded_tokens
        for kind, kept in want.optimizer.items():
            for name, tensor in kept.items():
                torch.testing.assert_close(result.optimizer[kind][name], tensor)
        assert result.num_together == len(group)
    return both


pytestmark = pytest.mark.usefixtures("full_precision")

shapes = st.lists(  # steps of a client
    st.lists(  # forward batches of a step
        st.lists(st.integers(2, 12), min_size=1, max_size=3),  # lengths of a batch's rows
        min_size=1,
        max_size=2,
    ),
    min_size=1,
    max_size=3,
)


@given(
    clients=st.lists(shapes, min_size=1, max_size=5),
    clip=st.sampled_from([0.0, 0.01, 1.0]),
    most=st.sampled_from([None, 8, 40]),
)
@settings(max_examples=12)
def test_every_client_ends_where_the_loop_would_have_brought_it(exact, clients, clip, most):
    """Ragged rows, unequal steps, accumulation, padding, dropout, clipping: all of it at once."""
    group = [own(exact, steps, k) for k, steps in enumerate(clients)]
    cfg = TrainConfig(local_steps=9, warmup_steps=1, weight_decay=0.01, clip_norm=clip)
    check_equal(exact, group, cfg, most=most)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_clients_of_equal_rows_are_one_product_each(exact, number, optimizer):
    group = [own(exact, 3 * [[[7, 7]]], k) for k in range(number)]
    check_equal(exact, group, TrainConfig(local_steps=3, optimizer=optimizer))


def test_a_wrong_owner_of_a_row_would_be_noticed(exact, monkeypatch):
    """The check of this file sees rows that are multiplied by another client's factors."""
    real = stacked.StackedAdapters.expect

    def mistaken(self, parts):
        real(self, [replace(part, client=0) for part in parts])

    monkeypatch.setattr(stacked.StackedAdapters, "expect", mistaken)
    with pytest.raises(AssertionError):
        check_equal(exact, [own(exact, [[[7]]], k) for k in range(3)])


def test_masks_of_dropout_are_those_of_the_loop(exact):
    """Without dropout the same check passes with any masks; with it, only with the loop's."""
    group = [own(exact, 2 * [[[6, 4]]], k) for k in range(3)]
    other = [replace(one, seed=one.seed + 1) for one in group]
    cfg, rule = TrainConfig(local_steps=2), LocalRule()
    both = train_together(exact, other, INSTRUCT, cfg, rule, round_=1)
    apart = [
        max(float((tensors[n] - t).abs().max()) for n, t in alone(exact, one, cfg, rule)[1].items())
        for one, (_, tensors) in zip(group, both, strict=True)
    ]
    assert min(apart) > 1e-4
    check_equal(exact, group, cfg, rule)


def test_rules_of_algorithms_act_on_each_client_alone(exact):
    """A penalty towards what each received, a correction, and tensors that are not trained."""
    rule = LocalRule(
        penalty=lambda now, context: sum(
            ((p - 0.5 * context.received[n]) ** 2).sum() for n, p in now.items()
        ),
        correct=lambda name, g, context: g + 0.1 * context.received[name],
        trains=lambda name, round_: "lora_B" in name,
    )
    group = [own(exact, steps, k) for k, steps in enumerate([[[[5, 3]]], 2 * [[[8]]]])]
    check_equal(exact, group, rule=rule, round_=2)


def test_moments_are_kept_for_each_client_and_go_on_from_there(exact):
    cfg = TrainConfig(local_steps=9, keep_moments=True)
    first = [own(exact, n * [[[5, 6]]], n, kept={}) for n in (1, 3)]
    found = check_equal(exact, first, cfg)
    then = [replace(one, kept=r.optimizer) for one, (r, _) in zip(first, found, strict=True)]
    assert {float(next(iter(o.kept["optimizer.step"].values()))) for o in then} == {1.0, 3.0}
    check_equal(exact, then, cfg)


def test_pairs_of_answers_are_joined_with_their_references(exact):
    task = prefer(PreferConfig(nll_weight=0.1))

    def pair(chosen: int, rejected: int, seed: int) -> Example:
        one, other = example(chosen, seed), example(rejected, seed + 1)
        return Example(
            torch.cat([one.ids, other.ids]),
            torch.cat([one.trained, other.trained]),
            segments=torch.arange(2).repeat_interleave(torch.tensor([chosen, rejected])),
            reference=torch.tensor([-9.0 - seed, -7.0]),
        )

    rows = [[pair(5, 4, 1)], [pair(9, 3, 2), pair(4, 4, 5)], [pair(3, 6, 8)]]
    group = [own(exact, [], k, steps=[[task.collate(r)]]) for k, r in enumerate(rows)]
    check_equal(exact, group, task=task)


def test_a_loss_of_the_users_own_is_used_for_each_client(exact, tmp_path, monkeypatch):
    (tmp_path / "sharp_loss.py").write_text(
        "import torch.nn.functional as F\n"
        "def squared(logits, targets):\n"
        "    return F.cross_entropy(logits, targets, reduction='none') ** 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = [own(exact, 2 * [[[6, 4]]], k) for k in range(2)]
    plain = check_equal(exact, group)
    task = own_loss("python:sharp_loss:squared", INSTRUCT)
    found = check_equal(exact, group, task=task)
    assert found[0][0].train_loss > 2 * plain[0][0].train_loss


def test_checkpointing_without_dropout_changes_nothing(tiny_model):
    plain = AdapterConfig(rank=2, targets=("q_proj", "v_proj"))
    loaded = load(tiny_model, plain, gradient_checkpointing=True)
    loaded.model.double()
    exact = replace(loaded, dtype=torch.float64)
    check_equal(exact, [own(exact, 2 * [[[5]]], k) for k in range(2)])


def test_a_core_between_the_factors_is_stacked_too(tiny_model):
    loaded = load(tiny_model)
    state = read_adapter(loaded)
    cores = {n.replace("lora_B", "lora_core"): torch.eye(2) for n in state if "lora_B" in n}
    write_adapter(loaded, {**state, **cores})
    loaded.model.double()
    exact = replace(loaded, dtype=torch.float64)
    assert len(exact.parameters) == 3 * len(cores)
    assert why_not_stacked(exact) is None
    rule = LocalRule(trains=lambda name, round_: "lora_core" in name)
    check_equal(exact, [own(exact, 2 * [[[5, 4]]], k) for k in range(2)], rule=rule)


def test_frozen_factors_beside_the_adapter_count_for_every_client(tiny_model):
    loaded = load(tiny_model)
    state, gen = read_adapter(loaded), torch.Generator().manual_seed(5)
    beside = {
        n.replace("lora_", "residual_"): torch.randn(t.shape, generator=gen)
        for n, t in state.items()
    }
    write_adapter(loaded, {**state, **beside})
    loaded.model.double()
    exact = replace(loaded, dtype=torch.float64)
    group = [own(exact, 2 * [[[5, 4]]], k) for k in range(2)]
    with_them = check_equal(exact, group)
    write_adapter(loaded, state)
    loaded.model.double()
    without = check_equal(exact, group)
    assert with_them[0][0].train_loss != pytest.approx(without[0][0].train_loss, abs=1e-3)


def test_a_loss_that_is_not_finite_stays_with_its_client(exact):
    group = [own(exact, 2 * [[[6, 4]]], k) for k in range(3)]
    broken = {n: t * float("nan") for n, t in group[1].context.received.items()}
    ill = replace(group[1], context=LocalContext(broken, {}, {}))
    cfg, rule = TrainConfig(local_steps=2), LocalRule()
    found = train_together(exact, [group[0], ill, group[2]], INSTRUCT, cfg, rule, round_=1)
    with pytest.raises(UpdateError, match="not a number"):
        check_loss(found[1][0])
    for k in (0, 2):
        _, want = alone(exact, group[k], cfg, rule)
        check_loss(found[k][0])
        for name, tensor in want.items():
            torch.testing.assert_close(found[k][1][name], tensor, rtol=0, atol=1e-5)


def test_seconds_are_shared_by_the_tokens_that_each_client_put_through(exact):
    group = [own(exact, [[[12]]], 0), own(exact, [[[6, 6, 6]]], 1)]
    one, other = train_together(exact, group, INSTRUCT, TrainConfig(), LocalRule(), round_=1)
    assert (one[0].num_padded_tokens, other[0].num_padded_tokens) == (12, 36)
    assert other[0].seconds == pytest.approx(3 * one[0].seconds)
    assert (one[0].num_tokens, other[0].num_tokens) == (12, 18)


def test_progress_is_told_for_every_client(exact):
    told: list[tuple[int, int, int]] = []
    group = [
        own(exact, n * [[[5]]], n, tell=lambda done, tokens, n=n: told.append((n, done, tokens)))
        for n in (1, 2)
    ]
    train_together(exact, group, INSTRUCT, TrainConfig(), LocalRule(), round_=1)
    assert told == [(1, 1, 5), (2, 1, 5), (2, 2, 10)]


def test_the_model_is_as_before_afterwards(exact):
    batch = INSTRUCT.collate([example(9, 3)])
    write_adapter(exact, {n: t.float() for n, t in start_of(exact, 4).items()})
    before = INSTRUCT.loss(exact, batch).logits
    state = torch.random.get_rng_state()
    group = [own(exact, 2 * [[[5]]], k) for k in range(2)]
    train_together(exact, group, INSTRUCT, TrainConfig(), LocalRule(), round_=1)
    assert not exact.model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(INSTRUCT.loss(exact, batch).logits, before)


# --- joining


def test_joined_batches_keep_what_each_row_predicts():
    batches = [steps_of([[rows]], seed)[0][0] for seed, rows in enumerate([[3, 5], [8], [2, 2, 4]])]
    joint = join(batches)
    assert joint.ids.shape == (6, 8)
    assert joint.num_real_tokens == 24
    assert int(joint.mask.sum()) == 24
    where, row = iter(joint.positions.tolist()), 0
    for batch in batches:
        width = batch.ids.shape[1]
        for place, target in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True):
            at = next(where)
            assert divmod(at, 8) == (row + place // width, place % width)
            assert int(joint.ids.flatten()[at + 1]) == target
        row += batch.ids.shape[0]
    assert torch.equal(joint.targets, torch.cat([b.targets for b in batches]))


# --- what cannot be stacked


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_else_is_trained_is_named(tiny_model):
    assert why_not_stacked(load(tiny_model)) is None
    dora = load(tiny_model, AdapterConfig(rank=2, dora=True, targets=("q_proj",)))
    assert "not a plain linear layer" in (why_not_stacked(dora) or "")
    words = AdapterConfig(rank=2, targets=("q_proj", "embed_tokens"))
    assert "not a plain linear layer" in (why_not_stacked(load(tiny_model, words)) or "")
    more = load(tiny_model)
    more.parameters["score.weight"] = nn.Parameter(torch.zeros(2, 16))
    assert "'score.weight' is trained too" in (why_not_stacked(more) or "")
    ia3 = AdapterConfig(
        kind="ia3", targets=("k_proj", "down_proj"), peft={"feedforward_modules": ["down_proj"]}
    )
    assert "only LoRA" in (why_not_stacked(load(tiny_model, ia3)) or "")


class _Beside(nn.Module):
    """A layer in which every row sees the mean of the batch."""

    def forward(self, x):
        return x + x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (_Beside(), "depends on the rows beside it"),
        (nn.Dropout(0.1), "the base itself has dropout"),
    ],
)
def test_a_model_whose_rows_meet_is_refused(tiny_model, layer, why):
    loaded = load(tiny_model)
    block = loaded.model.get_base_model().model.layers[0].mlp
    block.act_fn = nn.Sequential(block.act_fn, layer)
    before = torch.random.get_rng_state()
    assert why in (why_not_stacked(loaded) or "")
    assert torch.equal(before, torch.random.get_rng_state())
    assert not loaded.model.training


def test_an_adapted_layer_that_sees_tokens_out_of_their_rows_is_refused(tiny_model):
    loaded = load(tiny_model)
    block = loaded.model.get_base_model().model.layers[0].mlp
    real = block.forward
    block.forward = lambda x: real(x.flatten(0, 1)).view(x.shape)  # as experts do
    assert "out of their rows" in (why_not_stacked(loaded) or "")
