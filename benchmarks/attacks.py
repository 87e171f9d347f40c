"""What robust rules survive: a few hostile clients against FedAvg and every robust rule.

    python benchmarks/attacks.py            the table of docs/robust.md, in some minutes

Clients fit y = W x by LoRA factors, with plain gradient steps on rows of their own, whose columns
have other scales at each client. W has rank 2 and norm 1, and each client's own W differs from it
by 0.2. The error is |B A - W| / |W| after the last round, the mean over seeds with a 95 % t
interval: at 1 the federation is no better than no training. Only tensors; no model, no network.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.robust import (
    GeometricMedianConfig,
    KrumConfig,
    MedianConfig,
    MultiKrumConfig,
    NormBoundConfig,
    TrimmedMeanConfig,
    geometric_median,
    krum,
    median,
    multi_krum,
    norm_bound,
    trimmed_mean,
)
from silotune.core.algorithm import Algorithm
from silotune.core.seeds import generator
from silotune.core.stats import mean_interval
from silotune.core.tree import l2_norm, scale
from silotune.core.types import AdapterState, ServerState, Update

A, B = "lora_A", "lora_B"
ROWS, D_IN, D_OUT, RANK = 24, 12, 6, 2
ROUNDS, STEPS, LR = 40, 5, 0.3
SETTINGS = ((5, 1), (10, 2), (10, 4))
"""(clients, attackers among them)."""
SEEDS = range(5)

Rule = Callable[[int], tuple[AlgorithmConfig, Callable[..., Algorithm]]]
"""Number of attackers that the rule is told -> its settings, and what builds it."""
RULES: dict[str, Rule] = {
    "fedavg": lambda _: (FedAvgConfig(weights="uniform"), fedavg),
    "norm_bound": lambda _: (NormBoundConfig(norm=0.2), norm_bound),
    "median": lambda _: (MedianConfig(), median),
    "trimmed_mean": lambda f: (TrimmedMeanConfig(attackers=f), trimmed_mean),
    "geometric_median": lambda _: (GeometricMedianConfig(), geometric_median),
    "krum": lambda f: (KrumConfig(attackers=f), krum),
    "multi_krum": lambda f: (MultiKrumConfig(attackers=f), multi_krum),
}


# --- attacks: (its own change, those of the honest clients, generator) -> what an attacker sends

Attack = Callable[[AdapterState, Sequence[AdapterState], torch.Generator], AdapterState]


def flipped(own: AdapterState, _: Sequence[AdapterState], __: torch.Generator) -> AdapterState:
    """Its own change, backwards."""
    return scale(own, -1.0)


def scaled(own: AdapterState, _: Sequence[AdapterState], __: torch.Generator) -> AdapterState:
    """A hundred times its own change, backwards."""
    return scale(own, -100.0)


def at_random(own: AdapterState, _: Sequence[AdapterState], rng: torch.Generator) -> AdapterState:
    """Noise of ten times the norm of its own change."""
    drawn = {n: torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in own.items()}
    return scale(drawn, 10 * l2_norm(own) / l2_norm(drawn))


def colluding(
    own: AdapterState, honest: Sequence[AdapterState], _: torch.Generator
) -> AdapterState:
    """All attackers send the same: the mean of the honest changes, backwards, at its own size.

    Xie et al. 2020, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
    Manipulation", arXiv:1903.03936, section 4.
    """
    return {n: -torch.stack([h[n] for h in honest]).mean(0) for n in own}


ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "sign-flip": flipped,
    "scaled": scaled,
    "random": at_random,
    "colluding": colluding,
}


# --- the task


def error(rule: Rule, attack: str, num: int, attackers: int, *, seed: int, rounds: int) -> float:
    """The relative error after the last round. The last `attackers` clients are hostile."""
    cfg, build = rule(attackers)
    algorithm = build(cfg)
    wanted, own, moments = _task(seed, num)
    first = {
        A: _normal(seed, "A", RANK, D_IN) / D_IN**0.5,
        B: torch.zeros(D_OUT, RANK, dtype=torch.float64),
    }
    state, rng = ServerState(0, first), generator(seed, "attack", attack)
    hostile = ATTACKS[attack]
    for round_ in range(1, rounds + 1):
        changes = _train(state.adapter, own, moments)
        if hostile is not None:
            honest = changes[: num - attackers]
            bad = [hostile(change, honest, rng) for change in changes[num - attackers :]]
            changes = [*honest, *bad]
        updates = [Update(f"c{i:02}", round_, d, ROWS, {}) for i, d in enumerate(changes)]
        state = algorithm.step(state, algorithm.combine(state, updates))
        if not all(bool(t.isfinite().all()) for t in state.adapter.values()):
            return float("inf")
    return float((state.adapter[B] @ state.adapter[A] - wanted).norm() / wanted.norm())


def _task(seed: int, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """W (d_out, d_in); each client's own W; each client's x^T x / rows (num, d_in, d_in)."""
    wanted = _normal(seed, "left", D_OUT, RANK) @ _normal(seed, "right", RANK, D_IN)
    wanted = wanted / wanted.norm()
    other = _normal(seed, "own", num, D_OUT, D_IN)
    other = 0.2 * other / other.norm(dim=(1, 2), keepdim=True)
    x = _normal(seed, "rows", num, ROWS, D_IN)
    x = x * (0.3 * _normal(seed, "scales", num, 1, D_IN)).exp()
    return wanted, wanted + other, x.mT @ x / ROWS


def _normal(seed: int, purpose: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "attacks", purpose), dtype=torch.float64)


def _train(received: AdapterState, own: Tensor, moments: Tensor) -> list[AdapterState]:
    """Plain gradient steps of all clients at once; each client's change."""
    num = len(own)
    a, b = (received[n].expand(num, *received[n].shape) for n in (A, B))
    for _ in range(STEPS):
        slope = (b @ a - own) @ moments
        a, b = a - LR * b.mT @ slope, b - LR * slope @ a.mT
    return [{A: a[i] - received[A], B: b[i] - received[B]} for i in range(num)]


# --- the table


def cell(
    rule: Rule,
    attack: str,
    num: int,
    attackers: int,
    *,
    seeds: Sequence[int] = SEEDS,
    rounds: int = ROUNDS,
) -> str:
    """The mean error with its interval, or why there is none."""
    cfg, _ = rule(attackers)
    if cfg.least_updates > num:
        return f"needs {cfg.least_updates}"
    found = [error(rule, attack, num, attackers, seed=s, rounds=rounds) for s in seeds]
    mean, low, high = mean_interval([min(value, 1e9) for value in found])
    if mean > 100:
        return "over 100"
    around = "" if low is None or high is None else f" ({max(low, 0):.2f} to {high:.2f})"
    return f"{mean:.2f}{around}"


def table() -> str:
    """All rules under all attacks, as Markdown."""
    lines = [
        f"| hostile | rule | {' | '.join('no attack' if a == 'none' else a for a in ATTACKS)} |",
        f"|---|---|{'---|' * len(ATTACKS)}",
    ]
    for num, attackers in SETTINGS:
        for name, rule in RULES.items():
            cells = [cell(rule, attack, num, attackers) for attack in ATTACKS]
            lines.append(f"| {attackers} of {num} | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(), end="")
