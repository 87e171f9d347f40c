"""A client app that does nothing, for deployment.py: what a round of the engine itself costs."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:  # noqa: ARG001 - as Flower calls it
    """Answer at once, with nothing."""
    return Message(RecordDict(), reply_to=message)
