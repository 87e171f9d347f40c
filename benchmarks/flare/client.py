"""A site: plays a client of the round with TRL's SFTTrainer, through NVFlare's Client API.

NVFlare's own patch of a Trainer holds one client's rows for the life of a process, and 20 such
processes do not fit into this machine's memory; with fewer, its simulator starts a process anew for
every site that it polls. So three sites, which stay, play the clients: the best case for NVFlare.
"""

import sys

import nvflare.client as flare
from flowertune.shared import Job
from flowertune.training import trained


def main(path: str) -> None:
    """Every round, until the server ends the run."""
    job = Job.read(path)
    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        round_ = received.current_round
        client = job.cohorts[round_][site]
        adapter, num_rows, seconds, _ = trained(path, job, client, round_ + 1, received.params)
        flare.send(
            flare.FLModel(
                params=adapter, meta={"NUM_STEPS_CURRENT_ROUND": num_rows, "seconds": seconds}
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
