"""What the algorithms share: common settings, facts as data, the weighted mean of the deltas."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from silotune.core.algorithm import LocalContext
from silotune.core.tree import weighted_mean
from silotune.core.types import Config, Update, Updates


@dataclass(frozen=True)
class Facts:
    """What an algorithm promises and needs, as data.

    `check` refuses recipes by it, and the tables of `silotune algorithms` and docs/papers.md are
    made of it.
    """

    paper: str = ""
    """Authors, year, title, section, arXiv number."""
    differs: str = ""
    """What is done in another way than in the paper."""
    linear: bool = True
    """Whether the change is a weighted sum of the deltas. Only then the noise of
    client-level privacy can cover one client's influence."""
    exact: Literal["yes", "no", "nearly", "truncated"] = "no"
    """Whether the new factors' product is the mean of the clients' products: truncated to the rank
    is the best that any adapter of this rank can be, nearly is closer than the mean factors."""
    needs_lora: bool = False
    """Whether it needs LoRA's two factors, so that other kinds of adapter are refused."""
    mixed_ranks: bool = False
    """Whether clients may train factors of different ranks. Each receives the first columns and
    rows of the server's."""
    residual: bool = False
    """Whether it keeps frozen factors beside the adapter, which has no room for them. Clients
    receive them and train next to them; the base stays as it is."""
    core: bool = False
    """Whether it trains a small matrix between the factors, which is multiplied into one of them
    in whatever leaves the run."""
    sends_more: bool = False
    """Whether clients send something besides the delta, which no guard covers."""
    remembers: bool = False
    """Whether clients keep something between rounds, which is old at those that are rarely asked.
    Its server step also needs to know how many clients answered."""
    keeps: str = ""
    """What each client trains and never sends, so that each has an adapter of its own."""
    up: str = "adapter"
    """What a client sends."""
    down: str = "adapter"
    """What a client receives."""

    @property
    def by_sums(self) -> bool:
        """Whether the sum of a round's deltas is all that the server needs (secure sums)."""
        return self.linear and not (self.sends_more or self.remembers or self.mixed_ranks)


class AlgorithmConfig(Config):
    """Settings that every algorithm has; each algorithm adds its own."""

    weights: Literal["examples", "uniform"] = "examples"
    """Weight of a client in the mean: its number of training rows, or the same for every client."""
    facts: ClassVar[Facts] = Facts()

    @property
    def least_updates(self) -> int:
        """How many updates a round needs at least."""
        return 1

    @property
    def result_differs(self) -> bool:
        """Whether what leaves the run is another function than what clients received and scored."""
        return False

    @property
    def needs_plain_sgd(self) -> bool:
        """Whether clients must take plain gradient steps: no Adam, no clipping, no decay."""
        return False


def weight_of(update: Update, cfg: AlgorithmConfig) -> float:
    """A client's weight before normalisation."""
    return float(update.num_examples) if cfg.weights == "examples" else 1.0


def mean_delta(updates: Updates, cfg: AlgorithmConfig) -> dict[str, Tensor]:
    """The weighted mean of the deltas: `sum_i p_i D_i` with `p_i = w_i / sum_j w_j`."""
    return weighted_mean((weight_of(u, cfg), u.delta) for u in updates)


def kept(context: LocalContext, purpose: str, name: str, like: Tensor) -> Tensor:
    """What a client kept for a tensor in its earlier rounds, as `like`; 0 before the first."""
    own = context.memory.get(purpose, {})
    return own[name].to(like) if name in own else torch.zeros_like(like)
