"""What a runtime receives, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from silotune.core.types import ServerState
from silotune.data.client_rows import ClientRows
from silotune.federation.client import ClientData
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.models.loading import LoadedModel
from silotune.recipes.schema import RunConfig


@dataclass(frozen=True)
class Job:
    """The rounds of one run."""

    run: RunConfig
    state: ServerState
    """Where to start."""
    rows: Mapping[str, ClientRows]
    """The rows of all clients, as far as this machine may read them."""
    folder: RunFolder
    progress: Progress
    base_sha256: str
    """Hash of the server's base model: every client must have the same one."""
    local: frozenset[str] = frozenset()
    """Tensors that each client trains and keeps."""
    loaded: LoadedModel | None = None
    """The base with its adapter; only for a runtime that trains in this process."""
    consortium: Path | None = None
    """The consortium whose members are the clients; None if they are processes on this machine."""
    data: Mapping[str, ClientData] | None = None
    """The same rows as tokens, if another run in this process has already made them."""

    @property
    def names(self) -> Sequence[str]:
        """All clients, sorted."""
        return sorted(self.rows)


@dataclass(frozen=True)
class Measured:
    """What only the training processes know."""

    num_rows: Mapping[str, Mapping[str, int]]
    """num_train and num_eval of each client that answered."""
    base_model_loads: int
    """By all training processes together; the server's own does not count."""
    peak_memory_bytes: int | None
    """Peak of the largest process; None if no process reports it."""
