"""Errors that a user can fix. Everything else is a bug, and surfaces as one.

SilotuneError
├── ConfigError      a mistake in a recipe, an override or an argument        (exit 2)
├── DataError        a file, a column or a row that cannot be used            (exit 2)
│   ├── EmptyRowError  a row without a required text
│   └── HubUnreachable a data set on the hub, which this machine cannot reach
├── ModelError       a base model or an adapter that cannot be used           (exit 2)
├── RunFolderError   a run folder that is missing, not ours, in use or damaged (exit 2)
├── DiskError        a file cannot be written: no space, or no permission      (exit 1)
├── UpdateError      what a client sent cannot be combined; it names the client
├── Declined         a client's own limits do not allow what a recipe asks for
│   └── AwaitsConsent  its people have not agreed to the run yet
├── BudgetSpent      a client's privacy budget allows no more rounds
├── EngineError      a process that a runtime started failed or hung           (exit 1)
├── QuorumError      too few usable updates in a round; the run stops         (exit 1)
└── ClientTimeout    a client did not answer in time; it names the client

A message says what happened, where (client, round, tensor, file:key) and how to fix it. It
contains names and shapes, never values of rows or updates.
"""


class SilotuneError(Exception):
    """Base of all errors that a user can fix. `exit_code` is what the command line returns.

    It is 2 for a mistake in a recipe, in arguments, data, a model or a run folder (ConfigError,
    DataError, ModelError, RunFolderError), and 1 if a run failed (QuorumError, DiskError and
    others). The text says what happened, where, and how to fix it, and holds no row.
    """

    exit_code = 1


class ConfigError(SilotuneError):
    """All mistakes in a recipe or in arguments together, one per line."""

    exit_code = 2


class DataError(SilotuneError):
    """Rows that cannot be read, split or used."""

    exit_code = 2


class EmptyRowError(DataError):
    """A row that lacks a required text; a recipe can skip such rows."""


class HubUnreachable(DataError):
    """Rows on a hub that does not answer, so that nothing is known about them."""


class ModelError(SilotuneError):
    """A base model or adapter that cannot be fetched, loaded or matched."""

    exit_code = 2


class RunFolderError(SilotuneError):
    """A run folder that cannot be created, read or resumed."""

    exit_code = 2


class DiskError(SilotuneError):
    """A file cannot be written: no space, or no permission. No partial file is left behind."""


class UpdateError(SilotuneError):
    """One client's update cannot be combined with the others."""


class Declined(SilotuneError):
    """A client does not take part. The text names keys and limits, so the server may read it."""


class AwaitsConsent(Declined):
    """A client takes part as soon as the people who run it agree to the run."""


class BudgetSpent(SilotuneError):
    """A client's privacy budget allows no more rounds. The text names epsilons, never rows."""


class EngineError(SilotuneError):
    """An engine process ended or did not answer; the error names its log."""


class QuorumError(SilotuneError):
    """Fewer usable updates arrived than the recipe asks for."""


class ClientTimeout(SilotuneError):
    """A client did not deliver before the deadline."""


def first_line(text: str) -> str:
    """What happened, without how to fix it."""
    return text.split("\n", 1)[0]
