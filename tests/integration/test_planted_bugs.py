"""Bugs that privacy code is known for, planted into ours one by one: each has to be noticed.

A bug is a change of the source. Its check passes on the source as it is, and fails on the changed
one; so no check here can be one that never fails. What is planted: what reference system 002 and
Flower's wrappers do (never clipped, weights unequal, denominator realised, clip norm moved the
wrong way, noise behind the optimizer), and what else goes wrong in such code.
"""

import importlib
import inspect
import math
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedopt import FedAdamConfig, fedadam
from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import BudgetSpent
from silotune.core.tree import l2_norm
from silotune.core.types import ServerState, Update
from silotune.federation import (
    client,
    client_privacy,
    privacy_guarantee,
    privacy_statement,
    secure_sum,
)
from silotune.federation.ledger import FILE as LEDGER
from silotune.federation.ledger import lines, write_down
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model, read_adapter, write_adapter
from silotune.privacy import accountant, client_level, clip, discrete_gaussian, record_level
from silotune.privacy import noise as noise_source
from silotune.privacy.accountant import Steps, spent, spent_in_all
from silotune.privacy.base import PrivacyConfig
from silotune.privacy.secure_sum import noised
from silotune.recipes.parse import parse
from silotune.training import loop
from silotune.training.tasks.instruct import INSTRUCT
from silotune.workflows.audit.bounds import epsilon_lower_bound
from silotune.workflows.audit.canary_clients import guess, num_guesses, toss
from tests.conftest import write_jsonl, write_tiny_recipe
from tests.tiny_encoders import build_tiny_encoder

SHAPES = {"a": (30, 40), "b": (20, 5), "head": (100,)}


def planted(monkeypatch, module: str, old: str, new: str) -> None:
    """Run silotune with one piece of a module's source changed."""
    original = importlib.import_module(f"silotune.{module}")
    source = inspect.getsource(original)
    assert source.count(old) == 1, "the bug has no place any more"
    mutant = types.ModuleType(original.__name__)
    mutant.__file__ = original.__file__
    monkeypatch.setitem(sys.modules, original.__name__, mutant)  # dataclasses look themselves up
    exec(compile(source.replace(old, new), original.__file__, "exec"), vars(mutant))
    monkeypatch.setitem(sys.modules, original.__name__, original)
    for name, now in vars(original).items():
        changed = vars(mutant).get(name)
        if getattr(now, "__module__", None) != original.__name__ or changed is None:
            continue
        for user in [m for key, m in sys.modules.items() if key.startswith("silotune")]:
            if vars(user).get(name) is now:
                monkeypatch.setattr(user, name, changed)
            for function in filter(inspect.isfunction, vars(user).values()):
                for key, value in (function.__kwdefaults__ or {}).items():
                    if value is now:  # a default, which was looked up when the module was read
                        monkeypatch.setitem(function.__kwdefaults__, key, changed)


# --- whole clients, noise at the server -----------------------------------------------------------


def delta_of(seed: int, size: float = 1.0) -> dict:
    gen = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=gen) for name, shape in SHAPES.items()}
    return {name: size * t / l2_norm(drawn) for name, t in drawn.items()}


def recipe(seed=17, **privacy):
    given = {"unit": "client", "delta": 1e-5, "noise": "seeded", **privacy}
    return parse({"rounds": 1, "seed": seed, "data": {"path": "medquad_mini"}, "privacy": given,
                  "algorithm": {"weights": "uniform"}})  # fmt: skip


def guard(z: float, planned: int, inner=None, **cfg):
    known = {"unit": "client", "noise_multiplier": z, "delta": 1e-5, "clip_norm": 0.5, **cfg}
    return client_level.guarded(
        inner or fedavg(FedAvgConfig(weights="uniform")),
        PrivacyConfig(**known),
        noise_multiplier=z,
        num_planned=planned,
        noise=lambda round_: privacy_guarantee._noise(recipe(noise_multiplier=z), round_),
        write_down=lambda release: None,
    )


def state_of(algorithm) -> ServerState:
    adapter = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return ServerState(0, adapter, algorithm.init(adapter, 3))


def change_of(algorithm, deltas, counts=None) -> dict:
    counts = counts or [1] * len(deltas)
    pairs = enumerate(zip(deltas, counts, strict=True))
    updates = [Update(f"c{n}", 1, delta, count, {}) for n, (delta, count) in pairs]
    return dict(algorithm.combine(state_of(algorithm), updates).delta)


def the_noise_on_the_mean_has_its_size() -> None:
    found = change_of(guard(2.0, 4), [delta_of(1, 0.0)] * 4)
    values = torch.cat([t.flatten() for t in found.values()])
    assert float(values.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.1)


def no_client_moves_the_mean_by_more_than_its_share() -> None:
    """Clients of all lengths, with all their weight in one tensor, and of many rows."""
    others = [delta_of(1), delta_of(2, 0.1)]
    without = change_of(guard(0.0, 4), [*others, delta_of(1, 0.0)], [5, 1, 1])
    for name in SHAPES:
        for size in (1e-3, 1.0, 50.0):
            alone = {n: t * (n == name) for n, t in delta_of(7).items()}
            one = {n: size * t / l2_norm(alone) for n, t in alone.items()}
            for whole in (one, delta_of(8, size)):
                found = change_of(guard(0.0, 4), [*others, whole], [5, 1, 1000])
                moved = l2_norm({n: found[n] - without[n] for n in found})
                assert moved <= 0.5 / 4 * (1 + 1e-5)


def who_does_not_answer_leaves_the_denominator_as_it_is() -> None:
    found = change_of(guard(0.0, 4), [delta_of(1, 0.4)])
    assert l2_norm(found) == pytest.approx(0.4 / 4, rel=1e-5)


def the_adaptive_norm_finds_its_quantile() -> None:
    norms = torch.exp(0.5 * torch.randn(100, generator=torch.Generator().manual_seed(3)))
    for first in (0.9, 1.1):
        found = first
        for _ in range(200):
            share = float((norms <= found).double().mean())
            found = clip.next_clip_norm(found, share_within=share, quantile=0.5, lr=0.2)
        assert found == pytest.approx(float(norms.median()), rel=0.1)


def the_adaptive_bits_have_noise_however_many_answer() -> None:
    for answered in (1, 4):
        algorithm = guard(0.1, 4, clipping="adaptive")
        updates = [Update(f"c{n}", 1, delta_of(1, 0.1), 1, {}) for n in range(answered)]
        norm = algorithm.combine(state_of(algorithm), updates).extra["privacy"]["clip_norm"]
        share = 0.5 + 0.5 * answered / 4
        exact = clip.next_clip_norm(0.5, share_within=share, quantile=0.5, lr=0.2)
        assert abs(float(norm) - exact) > 1e-6


def no_client_moves_change_and_bits_by_more_than_is_charged() -> None:
    """Noise of 0, and the standard deviations that would have been drawn."""
    z, planned, stds = 1.5, 20, dict[bool, float]()

    def draw(shape, std):
        stds[list(shape) == [1]] = std
        return torch.zeros(tuple(shape))

    cfg = PrivacyConfig(unit="client", noise_multiplier=z, delta=1e-5, clipping="adaptive")
    algorithm = client_level.guarded(
        fedavg(FedAvgConfig(weights="uniform")), cfg, noise_multiplier=z, num_planned=planned,
        noise=lambda round_: draw, write_down=lambda release: None,
    )  # fmt: skip

    def released(sizes) -> tuple[dict, float]:
        updates = [Update(f"c{n}", 1, delta_of(n, size), 1, {}) for n, size in enumerate(sizes)]
        found = algorithm.combine(state_of(algorithm), updates)
        norm = math.log(float(found.extra["privacy"]["clip_norm"]))
        return dict(found.delta), -norm * planned / cfg.clip_lr

    for cohort in ([1.0] * 2, [9.0] * 19, [0.0, 0.5, 3.0]):
        without, bits = released(cohort)
        for size in (0.0, 0.5, 0.999, 5.0):
            found, more = released([*cohort, size])
            moved = planned * l2_norm({n: found[n] - without[n] for n in found})
            assert math.hypot(moved / stds[False], (more - bits) / stds[True]) <= 1.0001 / z


def the_optimizer_sees_the_noised_change() -> None:
    algorithm = guard(5.0, 2, fedadam(FedAdamConfig(weights="uniform")))
    state = state_of(algorithm)
    change = algorithm.combine(state, [Update("c", 1, delta_of(1, 0.0), 1, {})])
    assert l2_norm(change.delta) > 1
    stepped = algorithm.step(state, change)
    for name, moment in stepped.extra["first_moment"].items():
        assert torch.allclose(moment.float(), 0.1 * change.delta[name], atol=1e-6)
    # Adam bounds each number's step, so noise that came later would show as larger ones
    for name, after in stepped.adapter.items():
        assert float((after - state.adapter[name]).abs().max()) < 0.2


def two_rounds_have_different_noise() -> None:
    run = recipe(noise_multiplier=1)
    one, two = (privacy_guarantee._noise(run, r)([50], 1.0) for r in (1, 2))
    assert not torch.equal(one, two)


def an_audit_of_whole_clients_does_not_refute_the_claim() -> None:
    """Canary directions through the guard, in or out by a coin: 2 runs of 400, pooled."""
    z, delta, count, right = 2.0, 1e-4, 400, 0
    for seed in range(2):
        coins, gen = toss(count, seed), torch.Generator().manual_seed(seed)
        ways = torch.randn(count, 4000, generator=gen)
        ways /= ways.norm(dim=1, keepdim=True)
        algorithm = client_level.guarded(
            fedavg(FedAvgConfig(weights="uniform")),
            PrivacyConfig(unit="client", noise_multiplier=z, delta=delta),
            noise_multiplier=z,
            num_planned=count,
            noise=lambda round_, seed=seed: noise_source.seeded_noise(
                torch.Generator().manual_seed(1000 * seed + round_)
            ),
            write_down=lambda release: None,
        )
        state = ServerState(0, {"a": torch.zeros(4000)}, algorithm.init({}, count))
        updates = [Update(str(n), 1, {"a": 10.0 * way * coin}, 1, {})
                   for n, (way, coin) in enumerate(zip(ways, coins, strict=True))]  # fmt: skip
        released = algorithm.combine(state, updates).delta["a"]
        right += guess(coins, (ways @ released).tolist(), num_guesses(count)).num_correct
    lower = epsilon_lower_bound(
        num_guesses=2 * num_guesses(count), num_correct=right, num_canaries=2 * count, delta=delta
    )
    assert lower <= spent(noise_multiplier=z, num_releases=1, delta=delta).pld


def exact_delta(epsilon: float, mu: float) -> float:
    """For Gaussians without sampling: Balle and Wang 2018, Theorem 8. arXiv:1805.06530."""
    low = stats.norm.logcdf(-mu / 2 - epsilon / mu)
    return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + low))


def asking_few_clients_in_a_round_gains_nothing() -> None:
    """Every client knows the cohorts, so the closed form has no sampling in it."""
    clients = {f"client-{n:02d}": 5 for n in range(20)}
    for given in ({"noise_multiplier": 2.0}, {"target_epsilon": 3.0}):
        table = recipe(clipping="fixed", **given).model_dump(exclude_defaults=True)
        table |= {"rounds": 6, "sampling": {"fraction": 0.1}}
        found = privacy_guarantee.promise_of(parse(table), clients)
        assert found["num_planned"] == 2
        mu = math.sqrt(6) / found["noise_multiplier"]
        assert found["epsilon"]["pld"] <= given.get("target_epsilon", math.inf)
        assert exact_delta(found["epsilon"]["pld"], mu) <= 1e-5 * (1 + 1e-6)
        assert exact_delta(found["epsilon_replace"], 2 * mu) <= 1e-5 * (1 + 1e-6)


def what_was_spent_gains_nothing_either(tmp_path) -> None:
    promise = {"noise_multiplier": 2.0, "delta": 1e-5, "num_clients": 20, "num_planned": 2}
    run = recipe(noise_multiplier=2.0, noise="secure")
    for round_ in range(1, 7):
        write_down(tmp_path / LEDGER, {"round": round_})
    folder = types.SimpleNamespace(run=run, path=tmp_path)
    found = privacy_statement._spent_by_server(folder, promise)
    assert found["num_released"] == 6
    assert exact_delta(found["epsilon"]["pld"], math.sqrt(6) / 2) <= 1e-5 * (1 + 1e-6)


def a_classifiers_head_is_clipped_at_the_client_like_the_rest(tmp_path) -> None:
    """A whole run without noise: all that a client sends is together at most the clip norm."""
    labels = ("good", "bad")
    rows = [
        {"text": f"{'very ' * (n % 5)}{n}", "label": labels[n % 2], "where": f"place-{n % 3 // 2}"}
        for n in range(24)
    ]
    table = {
        "rounds": 1,
        "task": "classify",
        "model": {"name": str(build_tiny_encoder(tmp_path / "m")), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))},
        "partition": {"by": "where"},
        "train": {"batch_size": 4, "local_steps": 3, "lr": 1e-2, "max_length": 64},
        "algorithm": {"weights": "uniform"},
        "evaluate": {"every": 0},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False},
        "privacy": {"unit": "client", "noise_at": "client", "noise_multiplier": 0.0, "delta": 0.01,
                    "clip_norm": 1e-3},
    }  # fmt: skip
    done = silotune.run(parse(table), out=tmp_path / "run")
    norms = [row["delta_norm"] for row in done.metrics if row["event"] == "train"]
    assert len(norms) == 2
    assert max(norms) <= 1e-3 * (1 + 1e-4)
    assert min(norms) > 0.99e-3


def noise_at_the_client_is_in_every_tensor() -> None:
    run = recipe(noise_at="client", noise_multiplier=3.0, clip_norm=0.5)
    plan = client_privacy.ClientPlan("client", 100, 0.5, 3.0, 1.0, 100.0, 1, 1)
    found = client_privacy.Protection(run, "north", 1, plan).protect(delta_of(1, 0.0))
    assert found.keys() == SHAPES.keys()
    for tensor in found.values():
        assert float(tensor.std()) == pytest.approx(1.5, rel=0.3)


def discrete_noise_is_as_large_as_planned_and_in_what_is_summed() -> None:
    run = parse(
        {
            "rounds": 1,
            "data": {"path": "rows.jsonl"},
            "model": {"name": "tiny"},
            "algorithm": {"weights": "uniform"},
            "privacy": {"unit": "client", "noise_at": "client", "noise_multiplier": 0.5,
                        "delta": 0.01, "clip_norm": 0.2},
            "secure_sum": {"kind": "masks", "range": 1.0},
        }
    )  # fmt: skip
    numbers = secure_sum.Numbers(run, 4)
    sent = Update("north", 1, {"a": torch.zeros(20_000)}, 3, {}, {})
    words, _ = numbers.encode(sent)
    assert numbers.ring.decode(words[:-1]).std() == pytest.approx(0.1, rel=0.05)


def no_rounded_change_is_longer_than_the_norm() -> None:
    values = np.full(4000, 20.0)
    rounded = noised.round_within(
        values, norm=Fraction(1000), uniform=lambda count: np.full(count, 0.999)
    )
    assert noised.squared_norm(rounded) <= 1000**2


def discrete_noise_has_the_probabilities_of_its_formula() -> None:
    found = discrete_gaussian.discrete_gaussian(
        50_000, variance=2, draw=discrete_gaussian.secure_words
    )
    numbers = np.arange(-6, 7)
    chance = np.exp(-(numbers**2) / 4)
    seen = [np.count_nonzero(found == k) for k in numbers]
    expected = chance / chance.sum() * sum(seen)
    assert stats.chisquare(seen, expected).pvalue > 1e-6


def discrete_noise_is_counted_by_the_bound_that_holds_for_it() -> None:
    cost = accountant.spent_in_all([accountant.Steps(2.0, 10, discrete=True)], delta=1e-3)
    assert cost.pld == cost.rdp > spent(noise_multiplier=2.0, num_releases=10, delta=1e-3).pld


# --- single rows ----------------------------------------------------------------------------------


class Rows(torch.nn.Module):
    """A model in which a row's gradient is the row itself: one layer for each tensor."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
        self.layers = torch.nn.ModuleDict(
            {name: torch.nn.Linear(size, 1, bias=False) for name, size in sizes.items()}
        )

    def losses(self, rows: dict) -> torch.Tensor:
        return sum(self.layers[n](t.flatten(1)).flatten() for n, t in rows.items())


def stepped(
    rows: dict | None, *, z: float = 0.0, lot_size: float = 4.0, seed: int = 17, round_: int = 1
) -> dict:
    """What a step makes of some rows; None is an empty lot."""
    model = Rows()
    learning = {name: layer.weight for name, layer in model.layers.items()}
    run = recipe(seed, unit="record", noise_multiplier=z, clip_norm=0.5)
    plan = client_privacy.ClientPlan("record", 100, 0.5, z, 0.04, lot_size, 1, 1)
    own = client_privacy.Protection(run, "north", round_, plan).guard()
    with own.watching(model):
        if rows is not None:
            own.add(model.losses(rows), learning)
        own.release(learning)
    return {name: p.grad.clone() for name, p in learning.items()}


def batch(*rows: dict) -> dict:
    return {name: torch.stack([row[name] for row in rows]) for name in SHAPES}


def no_row_moves_a_step_by_more_than_its_share() -> None:
    others = [delta_of(1), delta_of(2, 0.1)]
    without = stepped(batch(*others))
    for name in SHAPES:
        for size in (1e-3, 1.0, 50.0):
            alone = {n: t * (n == name) for n, t in delta_of(7).items()}
            one = {n: size * t / l2_norm(alone) for n, t in alone.items()}
            for whole in (one, delta_of(8, size)):
                found = stepped(batch(*others, whole))
                moved = l2_norm({n: found[n] - without[n] for n in found})
                assert moved <= 0.5 / 4 * (1 + 1e-4)


def the_noise_of_a_step_has_its_size_in_every_tensor_whatever_the_lot() -> None:
    for rows in (None, batch(delta_of(1, 0.0)), batch(*[delta_of(1, 0.0)] * 3)):
        for gradient in stepped(rows, z=2.0).values():
            assert float(gradient.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.35)


def the_lot_that_was_drawn_leaves_the_denominator_as_it_is() -> None:
    found = stepped(batch(delta_of(1, 0.4)))
    assert l2_norm(found) == pytest.approx(0.4 / 4, rel=1e-5)


def no_two_steps_of_a_round_have_the_same_noise() -> None:
    for noise in ("seeded", "secure"):
        run = recipe(unit="record", noise_multiplier=1.0, noise=noise)
        plan = client_privacy.ClientPlan("record", 100, 0.5, 1.0, 0.1, 10.0, 3, 1)
        own, seen = client_privacy.Protection(run, "north", 1, plan).guard(), list[torch.Tensor]()
        learning = {name: torch.nn.Parameter(torch.zeros(40)) for name in ("a", "b")}
        for _ in range(3):
            own.release(learning)
            seen += [p.grad for p in learning.values()]
        assert len({tuple(gradient.tolist()) for gradient in seen}) == 6


def dropout_follows_no_seed_that_others_know(tiny_model) -> None:
    """Two rounds with the same seed, lots and rows, and without noise."""
    adapter = AdapterConfig(rank=2, alpha=4, dropout=0.3, targets=("q_proj", "v_proj"))
    base = ModelConfig(name=str(tiny_model), dtype="float32")
    loaded = load_model(base, adapter, seed=1, device="cpu")
    rows = [({"role": "user", "content": "q"}, {"role": "assistant", "content": "ab" * n})
            for n in (2, 3, 4)]  # fmt: skip
    examples = INSTRUCT.prepare(rows, loaded.tokenizer, 64).examples
    gen = torch.Generator().manual_seed(9)
    start = {n: torch.randn(t.shape, generator=gen) * 0.1 for n, t in read_adapter(loaded).items()}
    run = recipe(unit="record", noise_multiplier=0.0, noise="secure")
    plan = client_privacy.ClientPlan("record", 3, 0.5, 0.0, 1.0, 3.0, 1, 1)
    cfg = loop.TrainConfig(optimizer="sgd", batch_size=4, local_steps=1, clip_norm=0)

    def trained() -> dict:
        write_adapter(loaded, start)
        loop.train(
            loaded, [[INSTRUCT.collate(examples)]], INSTRUCT, cfg, LocalRule(),
            LocalContext(dict(start), {}, {}), round_=1, lr=1.0, seed=17,
            guard=client_privacy.Protection(run, "north", 1, plan).guard(),
        )  # fmt: skip
        return read_adapter(loaded)

    one, two = trained(), trained()
    assert any(not torch.equal(one[name], two[name]) for name in one)


def every_forward_pass_draws_the_masks_of_its_rows_one_by_one(tiny_model) -> None:
    asked = list[int]()

    class Counting(record_level.RowGuard):
        def dropout(self, num_rows):
            asked.append(num_rows)
            return super().dropout(num_rows)

    loaded = load_model(
        ModelConfig(name=str(tiny_model), dtype="float32"),
        AdapterConfig(rank=2, alpha=4, dropout=0.3, targets=("q_proj",)), seed=1, device="cpu",
    )  # fmt: skip
    row = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"})
    examples = INSTRUCT.prepare([row] * 5, loaded.tokenizer, 64).examples
    batches = [INSTRUCT.collate(examples[:3]), INSTRUCT.collate(examples[3:])]
    own = Counting(clip_norm=1.0, noise_multiplier=0.0, lot_size=1.0,
                   noise=noise_source.secure_noise, seeds=noise_source.secure_seeds)  # fmt: skip
    loop.train(
        loaded, [batches], INSTRUCT, loop.TrainConfig(local_steps=1), LocalRule(),
        LocalContext(read_adapter(loaded), {}, {}), round_=1, lr=1e-3, seed=1, guard=own,
    )  # fmt: skip
    assert asked == [3, 2]


def lots_are_a_coin_for_every_row_and_secret() -> None:
    run = recipe(unit="record", noise_multiplier=1.0, noise="secure")
    plan = client_privacy.ClientPlan("record", 50, 0.5, 1.0, 0.2, 10.0, 400, 1)
    one, two = (client_privacy.Protection(run, "north", 1, plan).lots() for _ in range(2))
    assert one != two, "drawn from a seed that others know"
    sizes = torch.tensor([float(len(lot)) for lot in one])
    assert float(sizes.var()) == pytest.approx(50 * 0.2 * 0.8, rel=0.4)


def secure_noise_knows_no_seed() -> None:
    run = recipe(unit="record", noise_multiplier=1.0, noise="secure")
    one, two = (
        client_privacy.Protection(run, "north", 1, None).noise()([20], 1.0) for _ in range(2)
    )
    assert not torch.equal(one, two)


COUNT, Z, RATE, STEPS, DELTA = 400, 3.0, 0.5, 6, 1e-4
CLAIM = spent(noise_multiplier=Z, num_releases=STEPS, delta=DELTA, sampling_rate=RATE).pld


def audit_of_rows(seed: int, *, noise: float = 1.0) -> int:
    """Rows with random directions, in or out by a coin, through lots, clipping and noise.

    Args:
        seed: Of coins, directions, lots and noise.
        noise: What is drawn, by what is claimed.

    Returns:
        How many of the guesses are right.
    """
    coins = toss(COUNT, seed)
    gen = torch.Generator().manual_seed(seed)
    seeds = torch.randint(1 << 30, (COUNT,), generator=gen).tolist()
    drawn = [delta_of(own, 10.0) for own in seeds]
    inside = [row for row, coin in zip(drawn, coins, strict=True) if coin]
    run = recipe(seed, unit="record", noise_multiplier=Z, clip_norm=0.5)
    plan = client_privacy.ClientPlan("record", len(inside), 0.5, Z, RATE, 1.0, STEPS, 1)
    total = {name: torch.zeros(math.prod(shape)) for name, shape in SHAPES.items()}
    lots = client_privacy.Protection(run, "north", 1, plan).lots()
    for step, lot in enumerate(lots, start=1):
        rows = batch(*[inside[n] for n in lot]) if lot else None
        found = stepped(rows, z=noise * Z, lot_size=1.0, seed=seed, round_=step)
        total = {name: t + found[name].flatten() for name, t in total.items()}
    scores = [sum(float(row[n].flatten() @ total[n]) for n in total) for row in drawn]
    return guess(coins, scores, num_guesses(COUNT)).num_correct


def bound(*right: int) -> float:
    """Of several audits together: guesses on independent coins add up."""
    return epsilon_lower_bound(
        num_guesses=num_guesses(COUNT) * len(right),
        num_correct=sum(right),
        num_canaries=COUNT * len(right),
        delta=DELTA,
    )


def an_audit_of_rows_does_not_refute_the_claim() -> None:
    assert bound(audit_of_rows(0), audit_of_rows(1)) <= CLAIM


def test_a_correct_mechanism_of_rows_never_exceeds_its_claim_and_a_third_of_its_noise_is_caught():
    right = [audit_of_rows(seed) for seed in range(20)]
    assert max(bound(own) for own in right) <= CLAIM
    assert 0 < bound(*right) <= CLAIM, "an audit without power would pass too"
    assert bound(*(audit_of_rows(seed, noise=1 / 3) for seed in range(20))) > CLAIM


# --- ledgers and what is told ---------------------------------------------------------------------


def a_resumed_client_counts_on(tmp_path) -> None:
    ledger = client_privacy.Ledger(tmp_path / "privacy.jsonl", "run")
    plan = client_privacy.ClientPlan("record", 100, 1.0, 2.0, 0.1, 10.0, 5, 2)
    for round_ in (1, 2):
        ledger.begin(plan, client="north", round_=round_, seeded=False)
    with pytest.raises(silotune.SilotuneError):
        ledger.begin(plan, client="north", round_=2, seeded=False)
    assert len(lines(ledger.path)) == 2


def a_release_of_the_whole_client_counts_twice_for_a_row(tmp_path) -> None:
    """An added row turns one clipped change into another, up to two clip norms away."""
    rows = client_privacy.ClientPlan("record", 100, 1.0, 2.0, 0.1, 10.0, 5, 2)
    whole = client_privacy.ClientPlan("client", 100, 1.0, 8.0, 1.0, 100.0, 1, 2)
    for first, then in ((rows, whole), (whole, rows)):
        exact = spent_in_all([Steps(2.0, 5, 0.1), Steps(4.0, 1)], delta=1e-5).pld
        for limit, allowed in ((exact + 1e-6, True), (exact - 1e-3, False)):
            path = tmp_path / f"{first.unit}-{allowed}.jsonl"
            ledger = client_privacy.Ledger(path, "run", limit, 1e-5)
            ledger.begin(first, client="north", round_=1, seeded=False)
            if allowed:
                ledger.begin(then, client="north", round_=2, seeded=False)
            else:
                with pytest.raises(BudgetSpent):
                    ledger.begin(then, client="north", round_=2, seeded=False)


def a_release_is_written_down_before_it_is_made(tmp_path, tiny_model) -> None:
    path = write_tiny_recipe(tmp_path, tiny_model)
    keys = ["privacy.unit=record", "privacy.delta=0.01", "privacy.noise_multiplier=1", "rounds=1"]
    with pytest.MonkeyPatch.context() as patch:

        def crash(*given, **more):
            raise KeyboardInterrupt

        patch.setattr(client, "train", crash)
        with pytest.raises(KeyboardInterrupt):
            silotune.run(path, keys, out=tmp_path / "r")
    assert len(lines(tmp_path / "r" / "clients" / "hospital-0" / "privacy.jsonl")) == 1


def a_real_client_tells_nothing_that_its_rows_decide() -> None:
    metrics = {"train_loss": 1.0, "num_tokens": 5.0, "penalty": 0.0, "num_targets": 3.0,
               "num_padded_tokens": 9.0, "lr": 0.1, "num_steps": 2, "seconds": 1.0}  # fmt: skip
    told = client.withheld(Update("north", 1, {}, 5, metrics))
    assert told.score is None
    assert set(told.metrics) == {"lr", "num_steps"}


CASES = {
    # what is planted: (module, source, changed source, what has to notice)
    "noise halved": (
        *("privacy.client_level", "of_change * clip_norm)) / num_planned"),
        *("0.5 * of_change * clip_norm)) / num_planned", the_noise_on_the_mean_has_its_size),
    ),
    "noise halved, by the audit": (
        *("privacy.client_level", "of_change * clip_norm)) / num_planned"),
        "0.3 * of_change * clip_norm)) / num_planned",
        an_audit_of_whole_clients_does_not_refute_the_claim,
    ),
    "never clipped": (
        *(
            "privacy.clip",
            "factor = 1.0 if norm <= clip_norm else clip_norm / norm",
            "factor = 1.0",
        ),
        no_client_moves_the_mean_by_more_than_its_share,
    ),
    "never clipped, by the audit": (
        *(
            "privacy.clip",
            "factor = 1.0 if norm <= clip_norm else clip_norm / norm",
            "factor = 1.0",
        ),
        an_audit_of_whole_clients_does_not_refute_the_claim,
    ),
    "clipped tensor by tensor": (
        "privacy.clip",
        "{name: tensor.double() * factor for name, tensor in delta.items()}, norm",
        "{n: t.double() * min(1.0, clip_norm / max(l2_norm({n: t}), 1e-9)) "
        "for n, t in delta.items()}, norm",
        no_client_moves_the_mean_by_more_than_its_share,
    ),
    "the head is not clipped": (
        "privacy.clip",
        "{name: tensor.double() * factor for name, tensor in delta.items()}, norm",
        "{n: t.double() * (1.0 if 'head' in n else factor) for n, t in delta.items()}, norm",
        no_client_moves_the_mean_by_more_than_its_share,
    ),
    "weights by rows": (
        "privacy.client_level",
        "total = {n: t + total[n] for n, t in clipped.items()} if total else clipped",
        "clipped = {n: t * update.num_examples for n, t in clipped.items()}\n"
        "        total = {n: t + total[n] for n, t in clipped.items()} if total else clipped",
        no_client_moves_the_mean_by_more_than_its_share,
    ),
    "divided by who answered": (
        *("privacy.client_level", "of_change * clip_norm)) / num_planned"),
        "of_change * clip_norm)) / num_updates",
        who_does_not_answer_leaves_the_denominator_as_it_is,
    ),
    "the clip norm moves the wrong way": (
        *("privacy.clip", "math.exp(-lr * (share_within - quantile))"),
        "math.exp(lr * (share_within - quantile))",
        the_adaptive_norm_finds_its_quantile,
    ),
    "the bits of the adaptive norm have no noise": (
        *("privacy.client_level", "bits + float(draw([1], of_bits))", "bits"),
        the_adaptive_bits_have_noise_however_many_answer,
    ),
    "the bits of the adaptive norm have no noise if everyone answers": (
        *("privacy.client_level", "bits + float(draw([1], of_bits))"),
        "bits + float(draw([1], of_bits)) * (num_updates < num_planned)",
        the_adaptive_bits_have_noise_however_many_answer,
    ),
    "bits of 0 and 1 are charged as if half as far apart": (
        *("privacy.client_level", "bits += 0.5 if norm <= clip_norm else -0.5"),
        "bits += norm <= clip_norm",
        no_client_moves_change_and_bits_by_more_than_is_charged,
    ),
    "gain by sampling cohorts is claimed": (
        "federation.privacy_guarantee",
        "    cost = spent(noise_multiplier=z, num_releases=releases, delta=delta)\n",
        "    cost = spent(noise_multiplier=z, num_releases=releases, delta=delta, "
        "sampling_rate=planned / len(num_examples))\n",
        asking_few_clients_in_a_round_gains_nothing,
    ),
    "gain by sampling cohorts is used for a target": (
        "federation.privacy_guarantee",
        "noise_for(target_epsilon=cfg.target_epsilon, num_releases=releases, delta=delta)",
        "noise_for(target_epsilon=cfg.target_epsilon, num_releases=releases, delta=delta, "
        "sampling_rate=planned / len(num_examples))",
        asking_few_clients_in_a_round_gains_nothing,
    ),
    "gain by sampling cohorts is in what was spent": (
        "federation.privacy_statement",
        "cost = spent(noise_multiplier=z, num_releases=count, delta=delta)",
        "cost = spent(noise_multiplier=z, num_releases=count, delta=delta, "
        "sampling_rate=promise['num_planned'] / promise['num_clients'])",
        what_was_spent_gains_nothing_either,
    ),
    "discrete noise has its multiplier as its variance": (
        *("privacy.secure_sum.noised", "(Fraction(noise_multiplier) * most) ** 2"),
        "Fraction(noise_multiplier) * most",
        discrete_noise_is_as_large_as_planned_and_in_what_is_summed,
    ),
    "no noise is added to what is summed": (
        *("federation.secure_sum", "if plan is not None and plan.discrete:", "if False:"),
        discrete_noise_is_as_large_as_planned_and_in_what_is_summed,
    ),
    "rounding lengthens changes": (
        "privacy.secure_sum.noised",
        "    if squared_norm(rounded) > norm**2:\n"
        "        rounded = np.trunc(scaled).astype(np.int64)\n"
        "    assert squared_norm(rounded) <= norm**2\n",
        "",
        no_rounded_change_is_longer_than_the_norm,
    ),
    "zero comes with both signs": (
        *("privacy.discrete_gaussian", "    accepted &= ~(negative & (size == 0))", "    pass"),
        discrete_noise_has_the_probabilities_of_its_formula,
    ),
    "discrete noise is counted as continuous": (
        *("privacy.accountant", "    if discrete:\n        rdp =", "    if False:\n        rdp ="),
        discrete_noise_is_counted_by_the_bound_that_holds_for_it,
    ),
    "noise at the client leaves out the head": (
        *("federation.client", "    delta = protection.protect(delta)\n"),
        "    delta |= protection.protect({n: t for n, t in delta.items() if 'lora' in n})\n",
        a_classifiers_head_is_clipped_at_the_client_like_the_rest,
    ),
    "noise at the client is not in the head": (
        *("privacy.client_level", "(clipped[name] + noise(clipped[name].shape, std)).float()"),
        "(clipped[name] + noise(clipped[name].shape, std * (name != 'head'))).float()",
        noise_at_the_client_is_in_every_tensor,
    ),
    "one noise for all steps of a round": (
        *("federation.client_privacy", "            noise=self.noise(),\n            seeds="),
        "            noise=lambda shape, std: self.noise()(shape, std),\n            seeds=",
        no_two_steps_of_a_round_have_the_same_noise,
    ),
    "one secure noise for all steps of a round": (
        *("federation.client_privacy", "            noise=self.noise(),\n            seeds="),
        "            noise=functools.cache(self.noise()),\n            seeds=",
        no_two_steps_of_a_round_have_the_same_noise,
    ),
    "dropout from the recipe's seed": (
        *("federation.client_privacy", 'if self.run.privacy.noise == "seeded" else secure_seeds'),
        "",
        dropout_follows_no_seed_that_others_know,
    ),
    "dropout by place in the forward pass": (
        *("training.local_step", "nullcontext() if guard is None else guard.dropout(num_rows):"),
        "nullcontext():",
        every_forward_pass_draws_the_masks_of_its_rows_one_by_one,
    ),
    "a release of the whole client counts once for a row": (
        *("federation.client_privacy", 'line["noise_multiplier"] / 2'),
        'line["noise_multiplier"]',
        a_release_of_the_whole_client_counts_twice_for_a_row,
    ),
    "noise behind the optimizer": (
        "privacy.client_level",
        "after = algorithm.step(replace(state, extra=inside), Change(change.delta))",
        "quiet = {n: torch.zeros_like(t) for n, t in change.delta.items()}\n"
        "        after = algorithm.step(replace(state, extra=inside), Change(quiet))\n"
        "        after = replace(after, adapter={n: t + change.delta[n] "
        "for n, t in after.adapter.items()})",
        the_optimizer_sees_the_noised_change,
    ),
    "the same noise in every round": (
        *(
            "federation.privacy_guarantee",
            'generator(run.seed, "privacy", round_)',
            'generator(run.seed, "privacy")',
        ),
        two_rounds_have_different_noise,
    ),
    "rows clipped tensor by tensor": (
        *("privacy.record_level", "norms = row_norms(found.values())\n"),
        "norms = row_norms(list(found.values())[:1])\n",
        no_row_moves_a_step_by_more_than_its_share,
    ),
    "rows never clipped, by the audit": (
        *("privacy.record_level", "(self.clip_norm / norms.clamp(min=1e-300)).clamp(max=1)"),
        "torch.ones_like(norms)",
        an_audit_of_rows_does_not_refute_the_claim,
    ),
    "the whole batch is clipped as one": (
        *("privacy.record_level", "factors = torch.where(usable, (self.clip_norm / norms"),
        "factors = torch.where(usable, (self.clip_norm * len(norms) / norms.sum()",
        no_row_moves_a_step_by_more_than_its_share,
    ),
    "divided by the drawn rows": (
        *("privacy.record_level", "torch.autograd.backward(row_losses.sum())"),
        "self.lot_size = len(row_losses); torch.autograd.backward(row_losses.sum())",
        the_lot_that_was_drawn_leaves_the_denominator_as_it_is,
    ),
    "an empty lot shows": (
        *("privacy.record_level", "total = noise.to(p.device)\n"),
        "total = noise.to(p.device) * bool(self._sums)\n",
        the_noise_of_a_step_has_its_size_in_every_tensor_whatever_the_lot,
    ),
    "noise of rows in units of the learning rate": (
        *("privacy.record_level", "self.noise_multiplier * self.clip_norm)"),
        "self.noise_multiplier * self.clip_norm / self.lot_size)",
        the_noise_of_a_step_has_its_size_in_every_tensor_whatever_the_lot,
    ),
    "lots of a fixed size": (
        *("privacy.record_level", "drawn = [(uniform(num_examples) < sampling_rate).numpy()"),
        "drawn = [(uniform(num_examples).argsort().argsort() < sampling_rate * num_examples)"
        ".numpy()",
        lots_are_a_coin_for_every_row_and_secret,
    ),
    "lots from the recipe's seed": (
        *("federation.client_privacy", "seeded_uniform(chance) if seeded else secure_uniform"),
        "seeded_uniform(chance)",
        lots_are_a_coin_for_every_row_and_secret,
    ),
    "secure noise from a seed": (
        *(
            "federation.client_privacy",
            'if self.run.privacy.noise == "secure":',
            'if self.run.privacy.noise == "none":',
        ),
        secure_noise_knows_no_seed,
    ),
    "losses leave the client": (
        *("federation.client", "return replace(update, metrics=known, score=None)"),
        "return replace(update, score=None)",
        a_real_client_tells_nothing_that_its_rows_decide,
    ),
    "seconds of secret lots leave the client": (
        *("federation.client", 'TOLD = ("lr", "num_steps")'),
        'TOLD = ("lr", "num_steps", "seconds", "seconds_training")',
        a_real_client_tells_nothing_that_its_rows_decide,
    ),
    "the ledger is reset on resume": (
        *(
            "federation.ledger",
            'open(path, "a", encoding="utf-8"',
            'open(path, "w", encoding="utf-8"',
        ),
        a_resumed_client_counts_on,
    ),
    "a repeated round is counted once": (
        *("federation.client_privacy", "if seeded and any(", "if any("),
        a_resumed_client_counts_on,
    ),
    "releases are written down afterwards": (
        "federation.client",
        "    protection.begin(worker.ledger or Ledger(own / LEDGER))\n"
        "    before = load_memory(own, round_)\n"
        "    update, after = train_round(worker, data, broadcast, before, protection, count="
        "count)\n",
        "    before = load_memory(own, round_)\n"
        "    update, after = train_round(worker, data, broadcast, before, protection, count="
        "count)\n"
        "    protection.begin(worker.ledger or Ledger(own / LEDGER))\n",
        a_release_is_written_down_before_it_is_made,
    ),
}


def asked(check, request):
    """Call a check with what it needs."""
    needed = inspect.signature(check).parameters
    return check(**{name: request.getfixturevalue(name) for name in needed})


CHECKS = {check.__name__: check for *_, check in CASES.values()}


@pytest.mark.parametrize("check", CHECKS)
def test_the_source_as_it_is_passes(check, request):
    asked(CHECKS[check], request)


@pytest.mark.parametrize("bug", CASES)
def test_a_planted_bug_is_noticed(bug, monkeypatch, request):
    module, old, new, check = CASES[bug]
    planted(monkeypatch, module, old, new)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        asked(check, request)
