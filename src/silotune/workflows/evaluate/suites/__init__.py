"""Benchmark suites: questions with known answers, from the hub or from a file."""

from silotune.workflows.evaluate.suites.base import Suite
from silotune.workflows.evaluate.suites.code import CodeSuite
from silotune.workflows.evaluate.suites.finance import FIQA, FPB, TFNS
from silotune.workflows.evaluate.suites.human_eval import HUMAN_EVAL
from silotune.workflows.evaluate.suites.mbpp import MBPP
from silotune.workflows.evaluate.suites.medical import CAREQA, MEDMCQA, MEDQA, PUBMEDQA
from silotune.workflows.evaluate.suites.mmlu import MMLU
from silotune.workflows.evaluate.suites.multiple import MULTIPLE_CPP, MULTIPLE_JS

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (PUBMEDQA, MEDQA, MEDMCQA, CAREQA, MMLU, FPB, FIQA, TFNS)
}
"""All question suites by name."""

CODE_SUITES: dict[str, CodeSuite] = {
    suite.name: suite for suite in (HUMAN_EVAL, MBPP, MULTIPLE_JS, MULTIPLE_CPP)
}
"""All suites that run programs, by name."""
