"""Flower's SuperLink, with more patience for its own database.

SQLite allows one write at a time. Flower lets other requests wait for five seconds and then
answers 500, which ends a run's server app. Large adapters that arrive from several clients at once
keep the database busy for longer than that (make bench-deploy). Start it as
`python -m silotune.runtime.flower.superlink`, with the arguments of `flower-superlink`.
"""

from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS

PRAGMA = "busy_timeout"
BUSY_MS = 25_000
"""Below the 30 s after which Flower's own clients give up on a request."""


def wait_longer() -> None:
    """Make every connection to the database wait this long for the others."""
    own = {**dict(SQLITE_PRAGMAS), PRAGMA: str(BUSY_MS)}
    # the module that opens connections has imported the name from `constant`
    sql_mixin.SQLITE_PRAGMAS = tuple(own.items())  # pyright: ignore[reportPrivateImportUsage]


if __name__ == "__main__":
    from flwr.superlink.cli import flower_superlink

    wait_longer()
    flower_superlink()
