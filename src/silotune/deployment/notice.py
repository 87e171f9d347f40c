"""What the server tells approved clients before they are asked to train: notice.json.

The gate serves it to those clients only. It holds what a run tells them anyway: the recipe of the
run that is queued or ran last, as it is sent to clients, and the hash of the server's base model.
"""

import importlib.metadata
import json
import ssl
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import make_folder, write_json
from silotune.deployment.consortium.gate import NOTICE, host_of
from silotune.deployment.consortium.kit import Kit
from silotune.deployment.orders import DONE, runs_of, state_of
from silotune.deployment.outbound_proxy import proxy_for
from silotune.deployment.queue import chosen_clients
from silotune.federation.run_folder import RunFolder
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.submit import travelling

VERSION = importlib.metadata.version("silotune")
TIMEOUT_S = 15.0
MOST_BYTES = 10_000_000


@dataclass(frozen=True)
class Notice:
    """The notice, as a client has read it."""

    version: str
    """Version of silotune on the server."""
    recipe: RunConfig | None
    base_sha256: str | None
    server_time: float
    """Seconds since 1970, by the server's clock."""


def write_notice(place: Path, folder: Path) -> None:
    """Write down what will be trained next, or was trained last.

    Args:
        place: The folder that the gate serves.
        folder: The consortium's folder.
    """
    # all clients read the same notice, and a run for some of them is not the others' business
    runs = [path for path in runs_of(folder).values() if chosen_clients(path) is None]
    open_ = [path for path in runs if state_of(path)["state"] != DONE]
    about: dict[str, Any] = {"version": VERSION, "recipe": None, "base_sha256": None}
    for path in (open_ or runs)[-1:]:
        run = RunFolder.open(path)
        about["recipe"] = travelling(run.run).model_dump_json(serialize_as_any=True)
        if (known := run.read_json("provenance.json")) is not None:
            about["base_sha256"] = known["base"]["sha256"]
    target = place / NOTICE.lstrip("/")
    text = json.dumps(about)
    if not target.is_file() or json.loads(target.read_text(encoding="utf-8")) != json.loads(text):
        make_folder(target.parent)
        write_json(target, about)


def read_notice(kit: Kit, context: ssl.SSLContext) -> Notice:
    """Ask the server, as a client that shows its certificate.

    Args:
        kit: Where the server is.
        context: Holds the kit's authority and certificate, and the client's key.

    Raises:
        OSError: The server cannot be reached, is another one, or refuses this client.
        ValueError: Its answer is not a notice.
        ConfigError: See `proxy_for`.
    """
    proxy = proxy_for(kit.host, kit.port)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({"https": proxy} if proxy else {}),
        urllib.request.HTTPSHandler(context=context),
    )
    with opener.open(f"https://{host_of(kit)}:{kit.port}{NOTICE}", timeout=TIMEOUT_S) as page:
        about = json.loads(page.read(MOST_BYTES))
        date = parsedate_to_datetime(page.headers["Date"]).timestamp()
    recipe = about["recipe"]
    return Notice(
        version=str(about["version"]),
        recipe=None if recipe is None else RunConfig.model_validate_json(recipe),
        base_sha256=about["base_sha256"],
        server_time=date,
    )
