"""The benchmark of clients in one batch runs, in its small form."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "together.py"

pytestmark = pytest.mark.slow


def test_the_small_form_measures_every_way_and_its_memory():
    cases = ["--cases", "3x1x8-20", "2x2x16"]
    command = [sys.executable, str(SCRIPT), "--small", "--memory", *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table = [x for x in done.stdout.splitlines() if x.startswith(("| 3x1x8-20", "| 2x2x16"))]
    assert [len(re.findall(r"\d\.\d\d \(", line)) for line in table] == [4, 4]
    memory = done.stdout.splitlines()[-1]
    assert re.search(r"peak memory, 3x1x8-20: loop .* together .* auto ", memory)
