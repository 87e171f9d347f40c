"""A client: takes the adapter, trains it on its rows, answers with the adapter."""

from typing import Any, cast

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flowertune.shared import Job
from flowertune.training import trained

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round at one client."""
    path = str(context.run_config["job"])
    job, config = Job.read(path), cast(Any, message.content["config"])
    arrays = cast(Any, message.content["arrays"]).to_torch_state_dict()
    adapter, num_rows, seconds, loss = trained(
        path, job, config["client"], config["server-round"], arrays
    )
    metrics = MetricRecord({"train_loss": loss, "num-examples": num_rows, "seconds": seconds})
    answer = RecordDict({"arrays": ArrayRecord(adapter), "metrics": metrics})
    return Message(content=answer, reply_to=message)
