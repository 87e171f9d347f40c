"""NVFlare's FedAvg, which tells each site which client it plays, and saves the adapter once."""

import json
import time
from pathlib import Path
from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg


class SameCohorts(FedAvg):
    """FedAvg over the adapters of clients that silotune asks in the same rounds."""

    def __init__(self, job_path: str, num_clients: int, num_rounds: int) -> None:
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, persistor_id="")
        self.job_path = job_path
        self._times: list[float] = []
        self._seconds: list[float] = []
        self._longest, self._bytes = 0.0, 0

    def load_model(self) -> FLModel:
        """The first adapter, and who plays whom; starts the clock of round one."""
        from flowertune.shared import Job, model_of
        from peft import get_peft_model_state_dict

        job = Job.read(self.job_path)
        params = get_peft_model_state_dict(model_of(self.job_path, job))
        self._times.append(time.time())
        return FLModel(params=params)

    def sample_clients(self, num_clients: int | None = None) -> list[str]:
        """Every site: who plays which client is in the message's round."""
        return sorted(super().sample_clients(num_clients))

    def _aggregate_one_result(self, result: FLModel) -> bool:
        sizes = [tensor.numel() * tensor.element_size() for tensor in result.params.values()]
        self._bytes += 2 * sum(sizes)  # the same tensors came down
        self._seconds.append(result.meta["seconds"])
        return super()._aggregate_one_result(result)

    def save_model(self, model: FLModel) -> None:
        """After each round: its time; after the last, the adapter."""
        from flowertune.shared import Job, model_of
        from peft import set_peft_model_state_dict

        job: Any = Job.read(self.job_path)
        self._times.append(time.time())
        self._longest += max(self._seconds)  # the sites train side by side
        self._seconds.clear()
        if len(self._times) <= len(job.cohorts):
            return
        wrapped = model_of(self.job_path, job)
        set_peft_model_state_dict(wrapped, model.params)
        wrapped.save_pretrained(f"{job.out}/adapter")
        told = {"times": self._times, "training": self._longest, "bytes": self._bytes}
        Path(job.out, "told.json").write_text(json.dumps(told))
