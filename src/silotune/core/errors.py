"""What can go wrong that a user can mend. Everything else is a bug and stays one.

SilotuneError
├── ConfigError      a mistake in a recipe, an override or an argument        (exit 2)
├── DataError        a file, a column or a row that cannot be used            (exit 2)
│   └── EmptyRowError  a row without a text that is needed
├── ModelError       a base model or an adapter that cannot be used           (exit 2)
├── RunFolderError   a run folder that is missing, foreign, taken or damaged  (exit 2)
├── DiskError        a file cannot be written: no room, or no right to        (exit 1)
├── UpdateError      what a client sent cannot be combined; the client is named
├── Declined         a client's own limits do not allow what a recipe asks for
├── BudgetSpent      a client's privacy budget allows no further round
├── EngineError      a process that a runtime started did not do its part      (exit 1)
├── QuorumError      too few usable updates in a round; the run stops         (exit 1)
└── ClientTimeout    a client did not answer in time; it is named

A message says what happened, where (client, round, tensor, file:key) and how to mend it. It holds
names and shapes, never values of rows or updates.
"""


class SilotuneError(Exception):
    """Base of all errors that a user can mend. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(SilotuneError):
    """Mistakes in a recipe or in arguments, all of them together, one per line."""

    exit_code = 2


class DataError(SilotuneError):
    """Rows that cannot be read, split or used."""

    exit_code = 2


class EmptyRowError(DataError):
    """A row that lacks a text; a recipe may leave such rows out."""


class ModelError(SilotuneError):
    """A base model or adapter that cannot be fetched, loaded or matched."""

    exit_code = 2


class RunFolderError(SilotuneError):
    """A run folder that cannot be created, read or resumed."""

    exit_code = 2


class DiskError(SilotuneError):
    """A file cannot be written: no room, or no right to. Nothing half-written stays."""


class UpdateError(SilotuneError):
    """One client's update cannot be combined with the others."""


class Declined(SilotuneError):
    """A client does not take part. The text names keys and limits, so the server may read it."""


class BudgetSpent(SilotuneError):
    """A client's privacy budget allows no further round. The text names epsilons, never rows."""


class EngineError(SilotuneError):
    """A process of the engine ended, or did not answer; the log is named."""


class QuorumError(SilotuneError):
    """Fewer usable updates arrived than the recipe asks for."""


class ClientTimeout(SilotuneError):
    """A client did not deliver before the deadline."""


def first_line(text: str) -> str:
    """What happened, without how to mend it."""
    return text.split("\n", 1)[0]
