"""`silotune client doctor`: would this client be able to take part? A line each, with a mend.

Looks at everything that has failed somebody before: keys, reachability, clocks, disks, rows, what
the loss is taken on, the base model's content, and memory, by one real training step.
"""

import datetime
import importlib.metadata
import platform
import shutil
import ssl
import time
import urllib.error
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from silotune.core.errors import SilotuneError
from silotune.core.wording import human_bytes
from silotune.data.partition import PartitionConfig
from silotune.deployment.consortium.gate import find_caddy
from silotune.deployment.consortium.kit import certificate_of
from silotune.deployment.join import KEY, Joined
from silotune.deployment.notice import VERSION, Notice, read_notice
from silotune.federation.client_config import check_base, check_steps, own_recipe, own_rows
from silotune.federation.recipe_model import give_template
from silotune.models.loading import folder_of_base, load_tokenizer
from silotune.models.sources import content_hash
from silotune.recipes.schema import RunConfig
from silotune.training.tasks import build_task
from silotune.workflows.plan.measure import Measurement, is_at_hand, measure
from silotune.workflows.preview import describe_rows

CLOCK_S = (60.0, 300.0)
"""Differences that are odd, and that the engine refuses: its signatures are good for so long."""
FREE_BYTES = 2_000_000_000
"""What a client's folder should have room for: logs, memory between rounds, temporary files."""
SOON_DAYS = 30
Verdict = Literal["ok", "look", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's."""

    what: str
    verdict: Verdict
    text: str
    mend: str = ""


def examine(joined: Joined, recipe: RunConfig | None = None) -> Iterator[Finding]:
    """Look at a client's machine, as far as it goes; each finding comes when it is made.

    Args:
        joined: The client's folder, kit and own configuration.
        recipe: What is to be trained; the server's own word when absent.
    """
    yield _certificate(joined)
    yield _programs()
    found, expected = _server(joined), None
    if isinstance(found, Finding):
        yield found
    else:
        notice, seconds = found
        kit = joined.kit
        where = f"{kit.host}, port {kit.port}, in {1000 * seconds:.0f} ms"
        yield Finding("server", "ok", f"reached at {where}; it knows this client")
        yield _clock(notice)
        yield _versions(notice)
        if recipe is None:
            recipe, expected = notice.recipe, notice.base_sha256
    yield _disk(joined)
    if recipe is None:
        text = "nothing is submitted, so rows, model and memory were not tried"
        yield Finding("recipe", "look", text, "Try one that may come: --recipe RECIPE.")
        return
    run = yield from _agree(joined, recipe)
    if run is None:
        return
    yield from _guarded("rows", lambda: _rows(joined, run))
    if not is_at_hand(run):
        text = f"{run.model.name} is not on this machine"
        yield Finding("model", "FAIL", text, "Fetch it, or set model in client.toml: --model DIR.")
        return
    yield from _guarded("model", lambda: _model(joined, run, expected))
    yield from _guarded("memory", lambda: _memory(run))


def _guarded(what: str, look: Callable[[], Finding]) -> Iterator[Finding]:
    """A look, or what went wrong in it."""
    try:
        yield look()
    except SilotuneError as error:
        first, _, rest = str(error).partition("\n")
        yield Finding(what, "FAIL", first, rest.strip())


def _certificate(joined: Joined) -> Finding:
    ends = certificate_of(joined.kit).not_valid_after_utc
    left = (ends - datetime.datetime.now(datetime.UTC)).days
    text = f"fits this client's key; good until {ends:%Y-%m-%d}"
    again = "Ask the server's people to approve request.toml again; it renews the kit."
    if left < 0:
        return Finding("kit", "FAIL", text, again)
    return Finding("kit", "look", text, again) if left < SOON_DAYS else Finding("kit", "ok", text)


def _programs() -> Finding:
    versions = f"silotune {VERSION}, Python {platform.python_version()}"
    try:
        find_caddy()
        flower = importlib.metadata.version("flwr")
    except (SilotuneError, importlib.metadata.PackageNotFoundError) as error:
        return Finding("programs", "FAIL", f"{versions}; {error}", "make env EXTRAS=deploy")
    return Finding("programs", "ok", f"{versions}, Flower {flower}, the proxy caddy")


def _server(joined: Joined) -> tuple[Notice, float] | Finding:
    """The server's notice and how long it took, or why there is none."""
    kit, where = joined.kit, f"{joined.kit.host}, port {joined.kit.port}"
    began = time.monotonic()

    def fail(text: str, mend: str) -> Finding:
        return Finding("server", "FAIL", f"{where}: {text}", mend)

    try:
        context = ssl.create_default_context(cadata=kit.authority)
        certificate = Path(joined.own.state) / "certificate.pem"
        certificate.parent.mkdir(parents=True, exist_ok=True)
        certificate.write_text(kit.certificate, encoding="ascii")
        context.load_cert_chain(certificate, joined.folder / KEY)
        return read_notice(kit, context), time.monotonic() - began
    except urllib.error.HTTPError as error:
        return fail(f"answers {error.code}", "Is this the consortium's server, and is it up?")
    except (ValueError, KeyError) as error:
        return fail(f"says what we do not understand: {error}", "Compare the versions.")
    except OSError as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(why, ssl.SSLCertVerificationError):
            mend = "Something between here and the server shows a certificate of its own, or it is"
            return fail("is not the server of this kit", f"{mend} another server: ask its people.")
        if isinstance(why, ssl.SSLError) or "reset" in str(why).lower():
            mend = "Its people have not approved this client, or have revoked it: ask them."
            return fail("does not let this client in", mend)
        mend = "Ask this machine's network people for outgoing TCP to that port, without a proxy."
        return fail(f"not reached ({why})", mend)


def _clock(notice: Notice) -> Finding:
    apart = time.time() - notice.server_time
    text = f"{abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the server's"
    if abs(apart) < CLOCK_S[0]:
        return Finding("clock", "ok", text)
    worse = abs(apart) >= CLOCK_S[1]
    return Finding("clock", "FAIL" if worse else "look", text, "Set it: timedatectl set-ntp true.")


def _versions(notice: Notice) -> Finding:
    if notice.version == VERSION:
        return Finding("version", "ok", f"the server's too: {notice.version}")
    text = f"here {VERSION}, at the server {notice.version}"
    return Finding("version", "FAIL", text, f"pip install silotune=={notice.version}")


def _disk(joined: Joined) -> Finding:
    state = Path(joined.own.state)
    state.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(state).free
    text = f"{human_bytes(free)} free in {state}"
    if free >= FREE_BYTES:
        return Finding("disk", "ok", text)
    return Finding("disk", "look", text, f"Make room for {human_bytes(FREE_BYTES)}.")


def _agree(joined: Joined, recipe: RunConfig) -> Generator[Finding, None, RunConfig | None]:
    """What this client's own limits say of the recipe; gives the recipe as it is run here."""
    try:
        run = own_recipe(recipe, joined.own)
    except SilotuneError as error:
        _, _, why = str(error).partition("\n")
        yield Finding("limits", "FAIL", why.strip(), "Change [limits] in client.toml, or decline.")
        return None
    about = f"{run.rounds} rounds of {getattr(run.algorithm, 'name', '')} on {recipe.model.name}"
    yield Finding("limits", "ok", f"this client agrees to {about}")
    return run


def _rows(joined: Joined, run: RunConfig) -> Finding:
    rows = own_rows(run, joined.own)
    check_steps(run, joined.own, len(rows.train))
    tokenizer = load_tokenizer(run.model)
    give_template(tokenizer, run)
    task, name = build_task(run.task, run.data.labels), joined.own.name
    told = describe_rows({name: rows}, tokenizer, task, run.train.max_length)[name]
    middle, most = told.train.tokens["p50"], told.train.tokens["max"]
    text = f"{told.num_train} to train on, {told.num_eval} held out, {middle:.0f} tokens in the "
    text += f"middle, {most:.0f} at most"
    if told.train.trained_share is not None:
        text += f"; the loss is taken on {100 * told.train.trained_share:.0f} % of them"
    if told.train.num_cut or told.train.num_dropped:
        text += f"; {told.train.num_cut} cut, {told.train.num_dropped} left out"
        mend = f"They are longer than train.max_length = {run.train.max_length}."
        return Finding("rows", "look", text, mend)
    return Finding("rows", "ok", text)


def _model(joined: Joined, run: RunConfig, expected: str | None) -> Finding:
    sha256 = content_hash(folder_of_base(run.model))
    check_base(joined.own, sha256)
    text = f"{run.model.name}, sha256 {sha256[:12]}..."
    if expected is None:
        mend = "The server has not said its own yet; it does when a run has begun."
        return Finding("model", "look", text, mend)
    if sha256 == expected:
        return Finding("model", "ok", f"{text}, the same as at the server")
    mend = "Get the same files: a client with another base is not asked to train."
    return Finding("model", "FAIL", f"{text}; the server has {expected[:12]}...", mend)


def _memory(run: RunConfig) -> Finding:
    import psutil

    # all of these rows are this one client's
    found = measure(
        run.model_copy(update={"partition": PartitionConfig(kind="iid", num_clients=1)})
    )
    if not isinstance(found, Measurement):
        mend = "Lower train.batch_size with the server's people, or free memory."
        return Finding("memory", "FAIL", f"one real step failed: {found}", mend)
    free = psutil.virtual_memory().available
    text = f"one real step of {found.batch.num_rows} rows: {human_bytes(found.peak_bytes)}"
    if found.device == "cuda":
        return Finding("memory", "ok", f"{text} on the GPU")
    text += f" of {human_bytes(free)} free"
    if found.peak_bytes <= free:
        return Finding("memory", "ok", text)
    return Finding("memory", "FAIL", text, "Free memory, or use a machine with more.")
