"""The server: FedAvg over the adapters, which is saved after the last round."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flowertune.shared import Job, model_of

app = ServerApp()


class SameCohorts(FedAvg):
    """FedAvg that tells each node which client it is, so that both systems ask the same ones."""

    def __init__(self, job: Job) -> None:
        share = len(job.cohorts[0]) / job.num_clients
        super().__init__(
            fraction_train=share, fraction_evaluate=0.0, min_available_nodes=job.num_clients
        )
        self.job, self.bytes, self.seconds = job, 0, list[float]()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg, with a client's name in each message."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message, client in zip(messages, self.job.cohorts[server_round - 1], strict=True):
            message.content["config"] = ConfigRecord({**config, "client": client})
            self.bytes += _size(arrays)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg; a failed client fails the run, because the work would not be the same."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
            content = cast(Any, reply.content)
            self.bytes += _size(content["arrays"])
            self.seconds.append(content["metrics"]["seconds"])
        return super().aggregate_train(server_round, replies)


def _size(arrays: ArrayRecord) -> int:
    return sum(len(array.data) for array in arrays.values())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The whole run."""
    path = str(context.run_config["job"])
    job = Job.read(path)
    model = model_of(path, job)
    times: list[float] = []

    def after(_: int, __: ArrayRecord) -> None:
        times.append(time.time())

    strategy = SameCohorts(job)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=len(job.cohorts),
        evaluate_fn=after,
    )
    model = model_of(path, job)  # as published: loaded again to be saved
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    model.save_pretrained(f"{job.out}/adapter")
    told = {"times": times, "training": sum(strategy.seconds), "bytes": strategy.bytes}
    Path(job.out, "told.json").write_text(json.dumps(told))
