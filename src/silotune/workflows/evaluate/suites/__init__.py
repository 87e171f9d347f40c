"""Benchmark suites: questions with known answers, from the hub or from a file."""

from silotune.workflows.evaluate.suites.base import Suite
from silotune.workflows.evaluate.suites.finance import FIQA, FPB, TFNS
from silotune.workflows.evaluate.suites.medical import CAREQA, MEDMCQA, MEDQA, PUBMEDQA
from silotune.workflows.evaluate.suites.mmlu import MMLU

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (PUBMEDQA, MEDQA, MEDMCQA, CAREQA, MMLU, FPB, FIQA, TFNS)
}
"""All question suites by name; the suite that runs programs is in `code.py`."""
