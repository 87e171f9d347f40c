"""Starts the run in NVFlare's simulator: `python job.py JOB`, in an environment with nvflare."""

import json
import sys
from pathlib import Path

from controller import SameCohorts
from nvflare.app_common.widgets.decomposer_reg import DecomposerRegister
from nvflare.client.config import ExchangeFormat
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner


def main() -> None:
    """Run to the end; a failed run ends with the simulator's status."""
    path = sys.argv[1]
    told = json.loads(Path(path).read_text())
    job, asked = FedJob(name="peers"), len(told["cohorts"][0])
    job.to_server(SameCohorts(job_path=path, num_clients=asked, num_rounds=len(told["cohorts"])))
    tensors = DecomposerRegister(["nvflare.app_opt.pt.decomposers.TensorDecomposer"])
    job.to_server(tensors, id="tensors")
    for site in range(asked):
        job.to(tensors, f"site-{site + 1}", id="tensors")
        runner = ScriptRunner(
            script=str(Path(__file__).with_name("client.py")),
            script_args=path,
            server_expected_format=ExchangeFormat.PYTORCH,
        )
        job.to(runner, f"site-{site + 1}")
    place = f"{told['out']}/workspace"
    sys.exit(job.simulator_run(place, threads=asked, log_config="concise"))


if __name__ == "__main__":
    main()
