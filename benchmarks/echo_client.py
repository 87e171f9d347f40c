"""A client app without a model, for messages.py: it returns as many numbers as it receives."""

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.payload import Parcel

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Report a name and some rows."""
    name = f"client-{int(context.node_config['partition-id']):05d}"
    rows = {"num_train": 1, "num_eval": 1, "num_cut": 0, "num_dropped": 0}
    report = {**rows, "base_sha256": "", "dtype": "torch.float32", "threads": 1}
    return Message(to_record(Parcel({"report": report, "client": name})), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer at once, with numbers that differ by client."""
    parcel, number = from_record(message.content), int(context.node_config["partition-id"])
    update = {
        "round": parcel.about["round"],
        "num_examples": 1,
        "metrics": {"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 1.0},
        "settings": {},
        "score": None,
        "tensors": [["delta", *rest] for _, *rest in parcel.about["tensors"]],
    }
    values = parcel.values + np.float32(number)
    return Message(to_record(Parcel({"update": update}, values)), reply_to=message)
