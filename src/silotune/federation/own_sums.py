"""The [secure_sum] section of client.toml: who this client's change may be added to."""

import re

from pydantic import Field, field_validator, model_validator

from silotune.core.types import Config

FINGERPRINT = r"([0-9a-f]{32}|[0-9a-f]{64})"


class OwnSumsConfig(Config):
    """What a client insists on when only sums may be read."""

    required: bool = False
    """Whether a recipe without secure sums is refused."""
    roster: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of each other client's key, by its name, as `silotune client init` prints it at
    that client. Compare them by telephone: the server could invent clients, and this is what
    prevents it. Without it, a recipe with secure sums is refused."""
    min_cohort: int = Field(default=4, ge=3)
    """Fewest clients whose sum this client takes part in. A recipe may ask for more."""
    key: str = "key.pem"
    """Private key by which the others know this client, relative to the folder of client.toml."""

    @field_validator("roster")
    @classmethod
    def _check_roster(cls, roster: dict[str, str]) -> dict[str, str]:
        found = {n: re.sub(r"[\s:]", "", t).lower() for n, t in roster.items()}
        for name, text in found.items():
            if not re.fullmatch(FINGERPRINT, text):
                raise ValueError(
                    f"the fingerprint of '{name}' must be eight groups of four hexadecimal digits, "
                    "as `silotune client init` prints it"
                )
        return found

    @model_validator(mode="after")
    def _check_required(self) -> "OwnSumsConfig":
        if self.required and not self.roster:
            raise ValueError("required needs roster: without it, every recipe would be refused")
        return self
