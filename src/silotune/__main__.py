"""`python -m silotune` is `silotune`."""

from silotune.cli import app

app()
