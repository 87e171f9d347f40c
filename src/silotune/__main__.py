"""`python -m silotune` does the same as `silotune`."""

from silotune.cli import app

app()
