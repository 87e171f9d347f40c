"""A client's rows as tokens, made when they are first needed, and what its process shares.

In a round of a thousand clients a few are asked, and most of the time of a run was spent on the
rows of the others. Knows no rounds, and not how rows become tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from silotune.core.algorithm import Algorithm
from silotune.federation.client_privacy import Ledger
from silotune.federation.progress import Progress
from silotune.federation.team import Team
from silotune.models.loading import LoadedModel
from silotune.recipes.schema import RunConfig
from silotune.training.tasks.base import Batch, Example, Task

SILENT = Progress()


@dataclass(frozen=True)
class Worker:
    """What a process shares among all the clients it serves: the model, the task, the recipe."""

    loaded: LoadedModel
    task: Task
    run: RunConfig
    algorithm: Algorithm
    ledger: Ledger | None = None
    """Where releases of rows are recorded; if absent, in each client's own folder."""
    quiet: bool = False
    """Whether no row may decide if this client answers: rows that cannot be used are no error."""

    progress: Progress = SILENT
    """Told the steps and batches of each client, on its own side."""

    keeps_optimizer: bool = False
    """Whether a client's optimizer goes on from round to round, as in one long training."""

    team: Team | None = None
    """The other processes that train with this one, if the recipe asks for them."""

    @property
    def counts_all(self) -> bool:
        """Whether rows that cannot be used count like the others.

        Otherwise the number of rows says how many fit `train.max_length` or have a text, and a
        recipe can choose what that means.
        """
        return self.quiet or self.run.privacy.unit != "none"


@dataclass(frozen=True)
class TrainTokens:
    """The train rows of one client."""

    examples: tuple[Example, ...]
    num_cut: int = 0
    num_dropped: int = 0
    num_unused: int = 0
    """Rows that count although they cannot be used, see `Worker.counts_all`. To training, each is a
    row whose gradient is zero."""


@dataclass(frozen=True)
class ScoredTokens:
    """The rows that are scored: validation rows if the recipe asks for them, else held-out ones."""

    batches: tuple[Batch, ...]
    num_rows: int
    num_cut: int = 0
    num_dropped: int = 0
    num_unused: int = 0
    """As in `TrainTokens`; they are not scored."""


class ClientData:
    """One client's rows. Each part is tokenized when it is first needed, and kept."""

    def __init__(
        self,
        name: str,
        train: Callable[[], TrainTokens],
        scored: Callable[[], ScoredTokens],
        *,
        num_given: tuple[int, int],
    ) -> None:
        """Nothing is tokenized yet.

        Args:
            name: The client.
            train: Makes the tokens of its train rows. Called at most once.
            scored: Makes those of the rows that are scored. Called at most once.
            num_given: Numbers of train rows and of scored rows before any is left out.
        """
        self.name = name
        self._train, self._scored = train, scored
        self._num_given = num_given

    @cached_property
    def train(self) -> TrainTokens:
        """Its train rows. Raises what tokenizing them raises."""
        return self._train()

    @cached_property
    def scored(self) -> ScoredTokens:
        """Its scored rows. Raises what tokenizing them raises."""
        return self._scored()

    @property
    def examples(self) -> tuple[Example, ...]:
        """Its train rows that can be used."""
        return self.train.examples

    @property
    def num_train(self) -> int:
        """Train rows of this client: its weight, and what sampling rates refer to."""
        return len(self.train.examples) + self.train.num_unused

    @property
    def num_rows(self) -> dict[str, int]:
        """num_train and num_eval without tokenizing anything: exact once a part is tokenized.

        Before, these are all rows, of which too long ones may be left out. Where all rows count,
        see `Worker.counts_all`, both are the same.
        """
        num_train, num_eval = self._num_given
        if "train" in vars(self):
            num_train = self.num_train
        if "scored" in vars(self):
            num_eval = self.scored.num_rows + self.scored.num_unused
        return {"num_train": num_train, "num_eval": num_eval}

    @property
    def num_cut(self) -> int:
        """Rows that were truncated, in the parts that have been tokenized."""
        return sum(part.num_cut for part in self._made())

    @property
    def num_dropped(self) -> int:
        """Of these, the rows that were left out."""
        return sum(part.num_dropped for part in self._made())

    def _made(self) -> list[TrainTokens | ScoredTokens]:
        there = vars(self)
        return [there[part] for part in ("train", "scored") if part in there]


def known_tokens(name: str, train: TrainTokens, scored: ScoredTokens) -> ClientData:
    """A client whose tokens are there already."""
    num_train, num_eval = len(train.examples) + train.num_unused, scored.num_rows
    return ClientData(
        name, lambda: train, lambda: scored, num_given=(num_train, num_eval + scored.num_unused)
    )
