"""A server app whose rounds do nothing, for deployment.py: it records how long each round took."""

import json
import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
PAUSE_S = 0.02
"""Pause between checks for answers: as short as silotune's shortest."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask every node and wait for all of them, round after round."""
    told = context.run_config
    while len(nodes := sorted(grid.get_node_ids())) < int(told["clients"]):
        time.sleep(PAUSE_S)
    seconds: list[float] = []
    for _ in range(int(told["rounds"])):
        began = time.monotonic()
        messages = [Message(RecordDict(), node, "train") for node in nodes]
        waiting = {key for key in grid.push_messages(messages) if key is not None}
        while waiting:
            for reply in grid.pull_messages(sorted(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
            time.sleep(PAUSE_S)
        seconds.append(time.monotonic() - began)
    Path(str(told["out"])).write_text(json.dumps(seconds), encoding="utf-8")
