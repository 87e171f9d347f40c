"""The [privacy] section: what is protected, how strongly, and where the noise comes from."""

from typing import Literal

from pydantic import Field

from silotune.core.types import Config


class PrivacyConfig(Config):
    """Differential privacy for the adapter that every round releases.

    Clients: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models",
    Algorithm 1. arXiv:1710.06963. Records: Abadi et al. 2016, "Deep Learning with Differential
    Privacy", Algorithm 1. arXiv:1607.00133.
    """

    unit: Literal["none", "client", "record"] = "none"
    """What is protected. client: all rows of a client together; someone who sees the adapters of
    all rounds can hardly tell whether it ever answered. The server sees each client's change, so it
    is trusted unless noise_at says otherwise. record: every single row of a client, even against
    the server; each client clips the gradient of each row and adds noise to every step (DP-SGD)."""
    noise_at: Literal["server", "client"] = "server"
    """With unit = "client". server: noise is added to the sum of all changes. client: each client
    clips its change and adds noise before it is sent, so the server need not be trusted, but the
    mean has far more noise for the same epsilon. With unit = "record", noise is always added at the
    client."""
    noise_multiplier: float | None = Field(default=None, ge=0)
    """Standard deviation of the noise on the clipped sum, in units of clip_norm. 0 only clips, and
    guarantees nothing."""
    target_epsilon: float | None = Field(default=None, gt=0)
    """Instead of noise_multiplier: use the smallest one that keeps the recipe's rounds within this
    epsilon. record: each client finds its own, based on its number of rows."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """Probability that the epsilon bound may fail. It should be well below 1 divided by the number
    of protected units (clients or rows)."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Upper bound on the L2 norm, over all tensors together, of a client's change or a row's
    gradient; longer ones are scaled down to it. With adaptive clipping, the norm of the first
    round."""
    clipping: Literal["fixed", "adaptive"] = "fixed"
    """With unit = "client". adaptive: the norm follows a quantile of the clients' norms, at the
    cost of slightly more noise (Andrew et al. 2021, arXiv:1905.03871)."""
    quantile: float = Field(default=0.5, gt=0, lt=1)
    """adaptive: the share of clients that should not be clipped."""
    clip_lr: float = Field(default=0.2, gt=0)
    """adaptive: how fast the norm moves per round, on a logarithmic scale."""
    max_participations: int | None = Field(default=None, ge=1)
    """With noise at the client: maximum number of rounds in which a client takes part. Its noise is
    calibrated for that number; if asked more often, it declines. Absent: all rounds. Meant for
    recipes that ask only some of the clients in each round."""
    noise: Literal["secure", "seeded"] = "secure"
    """seeded: the same noise in every run with the same seed, for tests and paired experiments.
    Anyone who knows the seed can subtract it, so it protects nobody."""

    @property
    def is_at_client(self) -> bool:
        """Whether each client adds the noise before it sends anything."""
        return self.unit == "record" or (self.unit == "client" and self.noise_at == "client")

    @property
    def clips_at_server(self) -> bool:
        """Whether the server clips each client's change before it is added to the sum."""
        return self.unit == "client" and not self.is_at_client
