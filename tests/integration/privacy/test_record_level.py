"""Record-level privacy, line by line: a row's own gradient, its bound, the noise, the lots."""

import math
import warnings

import pytest
import torch
from scipy import stats

from silotune.algorithms.ffa_lora import FFALoRAConfig, ffa_lora
from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import BudgetSpent, ModelError
from silotune.core.tree import subtract
from silotune.data.preferences import preference
from silotune.federation.client_privacy import ClientPlan, Ledger, released
from silotune.federation.ledger import lines
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig, quiet_libraries
from silotune.models.loading import load_model, read_adapter, write_adapter
from silotune.privacy import record_level
from silotune.privacy.accountant import Steps, noise_for, spent, spent_in_all, third_opinion
from silotune.privacy.noise import (
    secure_noise,
    secure_seeds,
    secure_uniform,
    seeded_noise,
    seeded_uniform,
)
from silotune.privacy.record_level import RowGuard, draw_lots, row_norms
from silotune.training.known_tokens import prepare_rows
from silotune.training.loop import TrainConfig, plan_lots, train
from silotune.training.row_gradient_check import check_row_gradients
from silotune.training.tasks import build_task
from silotune.training.tasks.base import row_losses
from silotune.training.tasks.classify import classify
from silotune.training.tasks.instruct import INSTRUCT
from silotune.training.tasks.prefer import PreferConfig
from tests.tiny_encoders import build_tiny_encoder

PLAIN = LocalRule()
LABELS = ("no", "yes")
SGD = {"optimizer": "sgd", "batch_size": 4, "local_steps": 1, "clip_norm": 0}


def quiet(shape, std):
    return torch.zeros(tuple(shape), dtype=torch.float64)


def guard_of(clip_norm=1e9, z=0.0, lot_size=4.0, noise=quiet):
    return RowGuard(
        clip_norm=clip_norm,
        noise_multiplier=z,
        lot_size=lot_size,
        noise=noise,
        seeds=secure_seeds,
    )


@pytest.fixture(scope="module", params=["instruct", "classify", "prefer"])
def case(request, tiny_model, tmp_path_factory):
    """A model whose tensors all have gradients, its task, and rows of very different lengths."""
    if request.param != "classify":
        adapter = AdapterConfig(rank=2, alpha=4, targets=("q_proj", "v_proj"))
        config = ModelConfig(name=str(tiny_model), dtype="float32")
        loaded, task = load_model(config, adapter, seed=1, device="cpu"), INSTRUCT
        pairs = [
            {"prompt": f"q{i}", "chosen": "ab" * (1 + 3 * i), "rejected": "cb" * (1 + (4 * i) % 7)}
            for i in range(6)
        ]
        rows = [
            (
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": "ab" * (1 + 3 * i)},
            )
            for i in range(6)
        ]
        if request.param == "prefer":
            task = build_task("prefer", cfg=PreferConfig(beta=2.0))
            rows = [preference(pair, where="x") for pair in pairs]
    else:
        with quiet_libraries():
            model = build_tiny_encoder(tmp_path_factory.mktemp("bert") / "m", "bert")
        config = ModelConfig(name=str(model), dtype="float32")
        adapter = AdapterConfig(rank=2, alpha=4)
        loaded = load_model(config, adapter, seed=1, device="cpu", labels=LABELS)
        task = classify(LABELS)
        rows = [{"text": "ab" * (1 + 3 * i), "label": LABELS[i % 2]} for i in range(6)]
    gen = torch.Generator().manual_seed(9)
    start = {n: torch.randn(t.shape, generator=gen) * 0.1 for n, t in read_adapter(loaded).items()}
    write_adapter(loaded, start)
    for p in loaded.parameters.values():
        p.requires_grad_(True)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # rows are compared one by one; test_row_dropout.py has dropout on
    return loaded, task, prepare_rows(rows, task, loaded, 128).examples, start


def one_by_one(case) -> list[dict]:
    """The slow way: each row alone, its mean loss, an ordinary backward pass."""
    loaded, task, examples, _ = case
    found = []
    for example in examples:
        batch = task.collate([example])
        assert batch.num_terms >= 1
        (task.loss(loaded, batch).loss_sum / batch.num_terms).backward()
        found.append({n: p.grad.clone() for n, p in loaded.parameters.items()})
        for p in loaded.parameters.values():
            p.grad = None
    return found


def length(gradients: dict) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in gradients.values()))


def released_by(guard, case, batches) -> dict:
    """What a step's gradient becomes, for some forward passes of rows."""
    loaded, task, examples, _ = case
    loaded.model.train()
    with guard.watching(loaded.model):
        for batch in batches:
            collated = task.collate([examples[i] for i in batch])
            losses = row_losses(task.loss(loaded, collated), collated)
            guard.add(losses, loaded.parameters, sequences=collated.sequences)
        guard.release(loaded.parameters)
    loaded.model.eval()
    found = {n: p.grad.clone() for n, p in loaded.parameters.items()}
    for p in loaded.parameters.values():
        p.grad = None
    return found


# --- gradients of rows ------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [1e9, 0.05, 1e-4])
def test_a_step_is_the_sum_of_clipped_row_gradients_of_a_plain_loop(case, clip_norm):
    expected = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in case[0].parameters.items()}
    for own in one_by_one(case):
        factor = min(1.0, clip_norm / length(own))
        for name, gradient in own.items():
            expected[name] += factor * gradient.double() / 4
    found = released_by(guard_of(clip_norm), case, [range(6)])
    size, expected = length(expected), {n: t.float() for n, t in expected.items()}
    assert size > 0
    assert length(subtract(found, expected)) < 1e-5 * size
    assert all(t.abs().max() > 0 for t in found.values()), "every tensor learns, the head too"


def test_the_size_of_forward_passes_changes_nothing(case):
    whole = released_by(guard_of(0.05), case, [range(6)])
    for size in (1, 2, 4):
        parts = [range(i, min(i + size, 6)) for i in range(0, 6, size)]
        found = released_by(guard_of(0.05), case, parts)
        assert length(subtract(found, whole)) < 1e-5 * length(whole)


def test_no_row_moves_the_sum_by_more_than_the_bound(case):
    for row in range(6):
        found = released_by(guard_of(0.01, lot_size=1), case, [[row]])
        assert length(found) == pytest.approx(0.01, rel=1e-6)
    everyone = released_by(guard_of(0.01, lot_size=1), case, [range(6)])
    for row in range(6):
        others = [r for r in range(6) if r != row]
        without = released_by(guard_of(0.01, lot_size=1), case, [others])
        assert length(subtract(everyone, without)) <= 0.01 * (1 + 1e-5)


def test_opacus_own_optimizer_clips_to_the_same_step(case):
    """An independent oracle: Opacus' clipping, with the mean it takes over the expected rows."""
    from opacus.grad_sample import GradSampleHooks
    from opacus.optimizers import DPOptimizer

    loaded, task, examples, _ = case
    if task.reference is not None:
        pytest.skip("Opacus takes each answer of a pair for a row")
    hooks = GradSampleHooks(loaded.model, batch_first=True, loss_reduction="sum")
    learning = list(loaded.parameters.values())
    inner = torch.optim.SGD(learning, lr=1.0)
    theirs = DPOptimizer(
        inner, noise_multiplier=0.0, max_grad_norm=0.05, expected_batch_size=4,
        loss_reduction="mean",
    )  # fmt: skip
    batch = task.collate(list(examples))
    loaded.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row_losses(task.loss(loaded, batch), batch).sum().backward()
    theirs.pre_step()
    expected = {n: p.grad.clone() for n, p in loaded.parameters.items()}
    hooks.cleanup()
    for p in learning:
        p.grad = None
        vars(p).clear()
    loaded.model.eval()
    found = released_by(guard_of(0.05), case, [range(6)])
    assert length(subtract(found, expected)) < 1e-5 * length(expected)


def test_a_row_that_overflows_contributes_nothing_and_spoils_no_other(case):
    loaded, task, examples, _ = case
    expected = released_by(guard_of(0.05), case, [[0, 2, 3, 4, 5]])
    guard = guard_of(0.05)
    loaded.model.train()
    with guard.watching(loaded.model):
        batch = task.collate(list(examples))
        factors = torch.tensor([1.0, math.inf, 1.0, 1.0, 1.0, 1.0])
        losses = row_losses(task.loss(loaded, batch), batch) * factors
        guard.add(losses, loaded.parameters, sequences=batch.sequences)
        guard.release(loaded.parameters)
    loaded.model.eval()
    found = {n: p.grad for n, p in loaded.parameters.items()}
    assert length(subtract(found, expected)) < 1e-5 * length(expected)


def test_the_mean_loss_of_a_row_does_not_depend_on_the_other_rows(case):
    loaded, task, examples, _ = case
    together = task.collate(list(examples))
    found = row_losses(task.loss(loaded, together), together).detach()
    for i, example in enumerate(examples):
        alone = task.collate([example])
        expected = float(task.loss(loaded, alone).loss_sum.detach()) / alone.num_terms
        assert float(found[i]) == pytest.approx(expected, rel=1e-4)


def test_tensors_without_row_gradients_are_refused(tiny_model):
    config = ModelConfig(name=str(tiny_model), dtype="float32")
    adapter = AdapterConfig(rank=2, alpha=4, dora=True, targets=("q_proj",))
    loaded = load_model(config, adapter, seed=1, device="cpu")
    with pytest.raises(ModelError, match="cannot compute their gradient for a single row"):
        guard_of().watching(loaded.model).__enter__()


def test_a_gradient_that_is_not_of_single_rows_is_refused(case):
    loaded = case[0]
    p = next(iter(loaded.parameters.values()))
    p.grad = torch.ones_like(p)
    guard = guard_of()
    with pytest.raises(ModelError, match="a gradient, but not for single rows"):
        guard.add(torch.zeros(2, requires_grad=True), {"x": p})
    p.grad = None


def test_every_private_round_checks_its_row_gradients_and_leaves_the_model_as_it_was(case):
    loaded, task, _, start = case
    loaded.model.train()
    check_row_gradients(loaded, task, loaded.parameters)
    assert loaded.model.training
    assert all(p.grad is None for p in loaded.parameters.values())
    assert all(torch.equal(t, start[n]) for n, t in read_adapter(loaded).items())
    loaded.model.eval()
    check_row_gradients(loaded, task, loaded.parameters)
    assert not loaded.model.training


@pytest.mark.parametrize("case", ["prefer"], indirect=True)
def test_answers_that_are_clipped_one_by_one_stop_the_round(case, monkeypatch):
    """The unit is the pair: the bound of a sum over pairs would be twice as large otherwise."""
    loaded, task, _, _ = case
    add = RowGuard.add

    def apart(self, losses, learning, *, sequences):
        assert sequences == 2
        add(self, losses, learning)

    monkeypatch.setattr(RowGuard, "add", apart)
    with pytest.raises(ModelError, match="a wrong gradient for a single row"):
        check_row_gradients(loaded, task, loaded.parameters)


def test_a_wrong_row_gradient_stops_the_round(case, monkeypatch):
    """Rows mixed up in one layer, as with a wrong batch dimension."""
    loaded, task, _, _ = case
    right = record_level._row_gradients

    def mixed(name, p, sequences):
        own = right(name, p, sequences)
        return own if own is None else own.mean(0, keepdim=True).expand_as(own)

    monkeypatch.setattr(record_level, "_row_gradients", mixed)
    with pytest.raises(ModelError, match="a wrong gradient for a single row"):
        check_row_gradients(loaded, task, loaded.parameters)


# --- noise ------------------------------------------------------------------------------------


def test_noise_has_the_right_size_and_is_added_to_trained_tensors_only(case):
    loaded = case[0]
    learning = dict(list(loaded.parameters.items())[:2])
    for p in loaded.parameters.values():
        p.grad = None
    draws = []
    guard = guard_of(clip_norm=0.5, z=3.0, lot_size=8, noise=secure_noise)
    while sum(d.numel() for d in draws) < 1e5:
        guard.release(learning)  # an empty lot: noise alone
        draws += [p.grad.flatten() for p in learning.values()]
    values = torch.cat(draws)
    assert float(values.std()) == pytest.approx(3.0 * 0.5 / 8, rel=0.02)
    assert stats.kstest(values.numpy() / (3.0 * 0.5 / 8), "norm").pvalue > 1e-4
    others = [p for name, p in loaded.parameters.items() if name not in learning]
    assert others
    assert all(p.grad is None for p in others)
    for p in learning.values():
        p.grad = None


def test_two_steps_never_share_their_noise(case):
    guard = guard_of(z=1.0, clip_norm=1.0, noise=seeded_noise(torch.Generator().manual_seed(1)))
    one, two = (released_by(guard, case, []) for _ in range(2))
    assert all(not torch.equal(one[name], two[name]) for name in one)


# --- the loop ---------------------------------------------------------------------------------


def trained(case, steps, guard, cfg=None, rule=PLAIN):
    loaded, task, examples, start = case
    write_adapter(loaded, start)
    batches = [[task.collate([examples[i] for i in batch]) for batch in step] for step in steps]
    cfg = TrainConfig(**SGD) if cfg is None else cfg
    context = LocalContext(dict(start), {}, {})
    result = train(loaded, batches, task, cfg, rule, context, round_=1, lr=0.1, seed=1, guard=guard)
    moved = subtract(read_adapter(loaded), start)
    write_adapter(loaded, start)
    for p in loaded.parameters.values():
        p.requires_grad_(True)
    return result, moved


def test_without_noise_and_bound_it_is_plain_training(case):
    """Rows of one length, so that a mean over tokens is a mean over rows."""
    loaded, task, examples, start = case
    same = (loaded, task, (examples[3],) * 4, start)
    _, expected = trained(same, [[[0, 1, 2, 3]]] * 3, None)
    _, found = trained(same, [[[0, 1, 2, 3]]] * 3, guard_of(lot_size=4))
    assert length(expected) > 0
    assert length(subtract(found, expected)) < 1e-5 * length(expected)


def test_an_empty_lot_is_a_step_of_noise_and_does_not_crash(case):
    result, moved = trained(case, [[], []], guard_of(1.0, 1.0, 4, secure_noise))
    assert result.num_steps == 2
    assert result.num_tokens == 0
    assert all(t.abs().max() > 0 for t in moved.values())


def test_after_a_guarded_round_the_model_trains_plainly_as_before(case):
    steps = [[[0, 1], [2, 3]], [[4, 5]]]
    _, before = trained(case, steps, None)
    trained(case, steps, guard_of(0.1, 1.0, 4, secure_noise))
    _, after = trained(case, steps, None)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(hasattr(p, "grad_sample") for p in case[0].model.parameters())


def test_the_clip_norm_of_plain_training_has_no_effect(case):
    small = TrainConfig(**{**SGD, "clip_norm": 1e-6})
    steps = [[[0, 1, 2]]]
    _, one = trained(case, steps, guard_of(0.1))
    _, other = trained(case, steps, guard_of(0.1), cfg=small)
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_what_ffa_lora_freezes_is_neither_noised_nor_part_of_the_norm(case):
    rule = ffa_lora(FFALoRAConfig()).local
    _, moved = trained(case, [[[0, 1]]], guard_of(1.0, 1.0, 4, secure_noise), rule=rule)
    frozen = [n for n in moved if not rule.trains(n, 1)]
    assert frozen
    for name, change in moved.items():
        assert (change.abs().max() > 0) == (name not in frozen)


# --- lots -------------------------------------------------------------------------------------


def test_lots_are_drawn_row_by_row_with_the_same_probability():
    lots = draw_lots(50, sampling_rate=0.2, num_lots=4000, uniform=secure_uniform)
    counts = torch.zeros(50)
    for lot in lots:
        counts[lot] += 1
    expected, spread = 4000 * 0.2, math.sqrt(4000 * 0.2 * 0.8)
    assert float((counts - expected).abs().max()) < 5 * spread
    sizes = torch.tensor([float(len(lot)) for lot in lots])
    assert float(sizes.var()) == pytest.approx(50 * 0.2 * 0.8, rel=0.15)  # not a fixed size
    assert draw_lots(3, sampling_rate=1.0, num_lots=2, uniform=secure_uniform) == [[0, 1, 2]] * 2
    assert [] in draw_lots(2, sampling_rate=0.1, num_lots=100, uniform=secure_uniform)


def test_secret_lots_ignore_the_seed_and_seeded_ones_follow_it():
    torch.manual_seed(0)
    one = draw_lots(100, sampling_rate=0.5, num_lots=2, uniform=secure_uniform)
    torch.manual_seed(0)
    assert draw_lots(100, sampling_rate=0.5, num_lots=2, uniform=secure_uniform) != one

    def seeded():
        gen = torch.Generator().manual_seed(3)
        return draw_lots(100, sampling_rate=0.5, num_lots=2, uniform=seeded_uniform(gen))

    assert seeded() == seeded()


def test_a_lot_of_any_size_becomes_forward_passes_of_at_most_the_batch():
    cfg = TrainConfig(batch_size=3)
    planned = plan_lots([[4, 0, 2, 1], [], [3]], [5, 9, 1, 7, 2], cfg)
    assert planned == [[[2, 4, 0], [1]], [], [[3]]]


def test_norms_are_over_all_tensors_together():
    one, two = torch.tensor([[3.0], [0.0]]), torch.tensor([[[4.0]], [[0.0]]])
    assert row_norms([one, two]).tolist() == [5.0, 0.0]


# --- accounting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "z", "releases", "rdp", "pld"),
    [
        (0.0042667, 1.12, 14063, 2.5187, 2.3103),
        (0.1, 1.0, 100, 7.9039, 7.0466),
        pytest.param(0.01, 1.0, 1000, 2.1014, 1.8282, marks=pytest.mark.slow),
        pytest.param(0.1, 2.0, 200, 3.6797, 3.3597, marks=pytest.mark.slow),
        pytest.param(0.04, 0.8, 500, 10.6253, 9.4925, marks=pytest.mark.slow),
    ],
)
def test_three_accountants_agree_on_poisson_sampling(rate, z, releases, rdp, pld):
    """The specification's anchors, which dp-accounting 0.6 gave; Opacus' PRV is independent."""
    cost = spent(noise_multiplier=z, num_releases=releases, delta=1e-5, sampling_rate=rate)
    assert cost.rdp == pytest.approx(rdp, abs=1e-3)
    assert cost.pld == pytest.approx(pld, abs=1e-3)
    third = third_opinion(Steps(z, releases, rate), delta=1e-5)
    assert cost.pld - 1e-3 <= third <= cost.pld + 0.02


@pytest.mark.parametrize(
    ("rate", "releases", "target", "z"),
    [
        (0.1, 100, 1, 3.9417),
        pytest.param(0.2, 50, 3, 2.2374, marks=pytest.mark.slow),
        pytest.param(0.01, 1000, 8, 0.5863, marks=pytest.mark.slow),
    ],
)
def test_the_noise_for_a_target_with_sampling_is_the_published_one(rate, releases, target, z):
    plan = {"num_releases": releases, "delta": 1e-5, "sampling_rate": rate}
    found = noise_for(target_epsilon=target, **plan)
    assert found == pytest.approx(z, rel=1e-3)
    assert target * 0.999 < spent(noise_multiplier=found, **plan).pld <= target


@pytest.mark.parametrize(("rate", "z", "releases"), [(0.8, 0.1, 60), (0.2, 0.05, 1000)])
def test_the_third_accountant_is_not_asked_if_its_memory_has_no_bound(rate, z, releases):
    """It once ended the process if there was next to no noise."""
    assert math.isinf(third_opinion(Steps(z, releases, rate), delta=1e-3))


@pytest.mark.parametrize("z", [1e-3, 1e-4, 1e-6])
def test_hardly_any_noise_is_an_enormous_epsilon_and_no_crash(z):
    assert spent(noise_multiplier=z, num_releases=3, delta=1e-5).pld > 1e5


def test_the_third_accountant_knows_releases_without_sampling():
    third = third_opinion(Steps(5.0, 100), delta=1e-5)
    assert third == pytest.approx(9.9973, abs=0.02)


def test_releases_of_different_runs_add_up():
    halves = [Steps(1.0, 50, 0.1), Steps(1.0, 50, 0.1)]
    whole = spent_in_all([Steps(1.0, 100, 0.1)], delta=1e-5)
    assert spent_in_all(halves, delta=1e-5) == whole
    mixed = spent_in_all([Steps(1.0, 50, 0.1), Steps(2.0, 10)], delta=1e-5).pld
    alone = [spent_in_all([own], delta=1e-5).pld for own in (Steps(1.0, 50, 0.1), Steps(2.0, 10))]
    assert max(alone) < mixed <= sum(alone)
    assert math.isinf(spent_in_all([Steps(1.0, 50, 0.1), Steps(0.0, 1)], delta=1e-5).pld)
    assert spent_in_all([], delta=1e-5).pld == 0


def test_sampling_never_costs_more_than_none():
    def cost(rate):
        return spent(noise_multiplier=2, num_releases=5, delta=1e-5, sampling_rate=rate).pld

    assert cost(0.1) < cost(0.5) < cost(0.99) <= cost(1.0)


# --- the client's own ledger ------------------------------------------------------------------

PLAN = ClientPlan("record", 100, 1.0, 2.0, 0.1, 10.0, 5, 3)


def begin(ledger, round_, plan=PLAN, *, seeded=False):
    ledger.begin(plan, client="north", round_=round_, seeded=seeded)


def test_a_ledger_allows_the_planned_rounds_and_counts_a_repeated_one(tmp_path):
    ledger = Ledger(tmp_path / "own" / "privacy.jsonl", "run1")
    for round_ in (1, 2, 2):
        begin(ledger, round_)
    assert [line["round"] for line in lines(ledger.path)] == [1, 2, 2]
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetSpent, match=r"client 'north', round 3: .* for 3 rounds, and"):
        begin(ledger, 3)
    assert ledger.path.read_bytes() == before
    assert released(lines(ledger.path)) == [Steps(2.0, 5, 0.1)] * 3
    begin(Ledger(ledger.path, "run2"), 1)  # another run has a plan of its own


def test_seeded_noise_of_a_repeated_round_is_no_new_release(tmp_path):
    ledger = Ledger(tmp_path / "privacy.jsonl")
    for round_ in (1, 2, 2, 1, 3):
        begin(ledger, round_, seeded=True)
    assert [line["round"] for line in lines(ledger.path)] == [1, 2, 3]


def test_a_clients_own_limit_holds_across_all_runs_on_its_rows(tmp_path):
    path = tmp_path / "privacy.jsonl"
    two = spent_in_all([Steps(2.0, 10, 0.1)], delta=1e-5).pld
    begin(Ledger(path, "run1", two + 1e-9, 1e-5), 1)
    begin(Ledger(path, "run2", two + 1e-9, 1e-5), 1)
    with pytest.raises(BudgetSpent, match="its own privacy limit allows no further round"):
        begin(Ledger(path, "run3", two + 1e-9, 1e-5), 1)
    assert len(lines(path)) == 2


def test_a_line_without_numbers_counts_as_the_worst_case():
    assert math.isinf(spent_in_all(released([{"round": 1}]), delta=1e-5).pld)
