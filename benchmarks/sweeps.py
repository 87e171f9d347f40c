"""What a sweep saves: `python benchmarks/sweeps.py [key=value]`.

Times the same four shortened runs of the demo's recipe on this machine: as four commands one after
the other, as one sweep, and as one sweep with several runs at once. Nothing else should run.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import silotune

SHORT = ["rounds=1", "train.local_steps=2", "report.samples=0", "report.page=false"]
SWEPT = {"train.lr": ("1e-3", "3e-3"), "adapter.rank": ("4", "8")}


def main() -> None:
    """Measure, and print seconds and ratios."""
    keys = [*SHORT, *sys.argv[1:]]
    silotune.base_folder("smollm2-135m-instruct")  # fetched before the clock starts
    swept = [f"{key}={','.join(values)}" for key, values in SWEPT.items()]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        began = time.perf_counter()
        for lr in SWEPT["train.lr"]:
            for rank in SWEPT["adapter.rank"]:
                own = [*keys, f"train.lr={lr}", f"adapter.rank={rank}"]
                _silotune("run", *own, f"--out={place / f'{lr}-{rank}'}")
        alone = time.perf_counter() - began
        print(f"four commands:                  {alone:6.1f} s  1.00")
        for jobs in (1, 2):
            began = time.perf_counter()
            _silotune("sweep", *keys, *swept, f"--jobs={jobs}", f"--out={place / str(jobs)}")
            seconds = time.perf_counter() - began
            print(f"one sweep, {jobs} at a time:         {seconds:6.1f} s  {seconds / alone:.2f}")


def _silotune(verb: str, *rest: str) -> None:
    command = [sys.executable, "-m", "silotune", verb, "hospitals", *rest]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
