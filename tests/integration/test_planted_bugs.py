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

import pytest
import torch

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedopt import FedAdamConfig, fedadam
from silotune.core.tree import l2_norm
from silotune.core.types import ServerState, Update
from silotune.federation import client, client_privacy, privacy_guarantee
from silotune.federation.ledger import lines
from silotune.privacy import client_level, clip
from silotune.privacy import noise as noise_source
from silotune.privacy.accountant import spent
from silotune.privacy.base import PrivacyConfig
from silotune.recipes.parse import parse
from silotune.workflows.audit.bounds import epsilon_lower_bound
from silotune.workflows.audit.canary_clients import guess, num_guesses, toss
from tests.conftest import write_tiny_recipe

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
    assert set(told.metrics) == {"lr", "num_steps", "seconds"}


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
    "the ledger is reset on resume": (
        *(
            "federation.ledger",
            'path.open("a", encoding="utf-8")',
            'path.open("w", encoding="utf-8")',
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
        "    memory = load_memory(own, round_)\n"
        "    update, memory = train_round(worker, data, broadcast, memory, protection, count="
        "count)\n",
        "    memory = load_memory(own, round_)\n"
        "    update, memory = train_round(worker, data, broadcast, memory, protection, count="
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
