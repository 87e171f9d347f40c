"""The [privacy] section: who is protected, how strongly, and where the noise comes from."""

from typing import Literal

from pydantic import Field

from silotune.core.types import Config


class PrivacyConfig(Config):
    """Differential privacy of the adapter that every round releases.

    Clients: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models",
    Algorithm 1. arXiv:1710.06963. Records: Abadi et al. 2016, "Deep Learning with Differential
    Privacy", Algorithm 1. arXiv:1607.00133.
    """

    unit: Literal["none", "client", "record"] = "none"
    """Who is protected. client: all rows of a client together; whoever sees the adapters of all
    rounds can hardly tell whether it took part. The server sees each client's own change, so it is
    trusted unless noise_at says otherwise. record: every single row of a client, also against the
    server; each client clips the gradient of each row and noises every step (DP-SGD)."""
    noise_at: Literal["server", "client"] = "server"
    """With unit = "client": server adds noise to the sum of all changes. client: each client clips
    and noises its own change before it is sent, so that the server need not be trusted; far more
    noise in the mean for the same epsilon. Records always have their noise at the client."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """Standard deviation of the noise on the sum of what is clipped, in units of clip_norm. 0 clips
    only, and promises nothing."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """Instead of noise_multiplier: find the smallest one that keeps the recipe's rounds below this
    epsilon. record: each client finds its own, for its number of rows."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """The probability with which the bound by epsilon may fail; well below 1 by the number of units
    that are protected, clients or rows."""
    clip_norm: float = Field(default=1.0, gt=0)
    """L2 norm over all tensors together to which a client's change is scaled down, or a row's
    gradient. With adaptive clipping the norm of the first round."""
    clipping: Literal["fixed", "adaptive"] = "fixed"
    """client. adaptive: the norm follows a quantile of the clients' norms, at the cost of a little
    of the noise (Andrew et al. 2021, arXiv:1905.03871)."""
    quantile: float = Field(default=0.5, gt=0, lt=1)
    """adaptive: the share of clients that shall not be clipped."""
    clip_lr: float = Field(default=0.2, gt=0)
    """adaptive: how fast the norm moves, per round, by its logarithm."""
    max_participations: int | None = Field(default=None, ge=1)
    """Noise at the client: rounds in which a client may take part, and for which its noise is
    found; one that is asked more often declines. Absent: all rounds. For recipes that ask a part of
    the clients."""
    noise: Literal["secure", "seeded"] = "secure"
    """seeded: the same noise in every run of a seed, for tests and paired experiments. Whoever
    knows the seed can take it off again, so it protects nobody."""

    @property
    def is_at_client(self) -> bool:
        """Whether each client protects what it sends by itself."""
        return self.unit == "record" or (self.unit == "client" and self.noise_at == "client")
