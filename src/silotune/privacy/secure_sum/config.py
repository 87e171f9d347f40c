"""The [secure_sum] section: whether the server sees single changes."""

from typing import Literal

from pydantic import Field

from silotune.core.types import Config


class SecureSumConfig(Config):
    """Sums that the server can read, of changes that it cannot.

    Masks: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
    Learning", doi 10.1145/3133956.3133982. CKKS: Cheon, Kim, Kim and Song 2017, "Homomorphic
    Encryption for Arithmetic of Approximate Numbers", doi 10.1007/978-3-319-70694-8_15.
    """

    kind: Literal["none", "masks", "ckks"] = "none"
    """masks: clients hide their changes under masks that cancel in the sum, so that the server
    learns the sum over all clients of a round and no single change. ckks: clients encrypt their
    changes homomorphically under one key that all of them share, for policies that ask for it by
    name; in simulations only, eight times the bytes, and a client that gives the key away opens
    every change."""
    range: float | None = Field(default=None, gt=0)
    """Largest absolute value of a single number of a client's change; larger ones are cut to it.
    The sum is exact in steps of `range` divided by about 2^28, so a few times the largest change
    that you expect costs nothing."""
    min_cohort: int = Field(default=4, ge=3)
    """Fewest clients whose sum a client takes part in. Each client insists on it, whatever the
    server says, and the guarantee of sums counts on no more. The sum over two tells each of them
    the other's change, and if all but one work together, the sum over more does, too."""
    max_examples: int = Field(default=10_000, ge=1)
    """With algorithm.weights = "examples": most training rows of a client. A change is multiplied
    by its client's number of rows before it is masked, so this makes the steps coarser."""
    colluding: int = Field(default=1, ge=0)
    """With [privacy]: clients whose noise the reader of the sums knows, for example because it is
    one of them. The guarantee of the sums counts on the noise of the others."""
    simulate: bool = False
    """In one process: the same numbers, bit for bit, without keys and masks, which take time for
    every pair of clients."""

    @property
    def is_on(self) -> bool:
        """Whether single changes are hidden."""
        return self.kind != "none"
