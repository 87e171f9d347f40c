"""The [privacy] section: who is protected, how strongly, and where the noise comes from."""

from typing import Literal

from pydantic import Field

from silotune.types import Config


class PrivacyConfig(Config):
    """Differential privacy of the adapter that every round releases.

    McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1.
    arXiv:1710.06963.
    """

    unit: Literal["none", "client"] = "none"
    """Who is protected. client: all rows of a client together; whoever sees the adapters of all
    rounds can hardly tell whether it took part. The server sees each client's own change, so it is
    trusted."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """Standard deviation of the noise on the sum of changes, in units of clip_norm. 0 clips only,
    and promises nothing."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """Instead of noise_multiplier: find the smallest one that keeps the recipe's rounds below this
    epsilon."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """The probability with which the bound by epsilon may fail; well below 1 by the number of
    clients."""
    clip_norm: float = Field(default=1.0, gt=0)
    """L2 norm over all sent tensors together to which a client's change is scaled down. With
    adaptive clipping the norm of the first round."""
    clipping: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: the norm follows a quantile of the clients' norms, at the cost of a little of the
    noise (Andrew et al. 2021, arXiv:1905.03871)."""
    quantile: float = Field(default=0.5, gt=0, lt=1)
    """adaptive: the share of clients that shall not be clipped."""
    clip_lr: float = Field(default=0.2, gt=0)
    """adaptive: how fast the norm moves, per round, by its logarithm."""
    noise: Literal["secure", "seeded"] = "secure"
    """seeded: the same noise in every run of a seed, for tests and paired experiments. Whoever
    knows the seed can take it off again, so it protects nobody."""
