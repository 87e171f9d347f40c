"""`silotune client doctor`: checks whether this client can take part, one line per check.

A check that fails has a fix. It looks at everything that has gone wrong before: keys, reachability,
clocks, disks, rows, what the loss covers, the base model's content, and memory, by one real
training step.
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

from silotune.core.atomic_files import make_folder, write_atomically
from silotune.core.errors import Declined, SilotuneError
from silotune.core.wording import counted, human_bytes
from silotune.data.partition import PartitionConfig
from silotune.deployment.consortium.caddy import find_caddy
from silotune.deployment.consortium.certificates import fingerprint, public_key
from silotune.deployment.consortium.kit import certificate_of
from silotune.deployment.join import KEY, OWN, Joined
from silotune.deployment.notice import VERSION, Notice, read_notice
from silotune.federation.client_recipe import (
    check_base,
    check_steps,
    check_version,
    own_recipe,
    own_rows,
)
from silotune.federation.recipe_model import give_template, warn_of_template
from silotune.models.base import folder_of_base, inspect_base, load_tokenizer
from silotune.models.sources import content_hash
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.bundle import READ, versions_read
from silotune.runtime.identity import identity_of
from silotune.training.tasks import build_task
from silotune.workflows.plan.measure import Measurement, is_at_hand, measure
from silotune.workflows.preview import describe_rows

CLOCK_S = (60.0, 300.0)
"""Seconds of difference that are suspicious, and at which the engine's signatures have expired."""
FREE_BYTES = 2_000_000_000
"""Room for what a client keeps: logs, memory between rounds, temporary files."""
SOON_DAYS = 30
Verdict = Literal["ok", "look", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    verdict: Verdict
    text: str
    fix: str = ""


def examine(joined: Joined, recipe: RunConfig | None = None) -> Iterator[Finding]:
    """Check a client's machine as far as possible; yields each finding as soon as it is made.

    Args:
        joined: The client's folder, kit and own configuration.
        recipe: What will be trained; by default, what the server announces.
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
        yield _versions(joined, notice)
        if recipe is None:
            recipe, expected = notice.recipe, notice.base_sha256
    yield _disk(joined)
    if recipe is None:
        text = "no run is submitted, so rows, model and memory were not checked"
        yield Finding("recipe", "look", text, "Check a recipe that you expect: --recipe RECIPE.")
        return
    run = yield from _agree(joined, recipe)
    if run is None:
        return
    if run.secure_sum.is_on:
        yield from _guarded("sums", lambda: _sums(joined, run))
    yield from _guarded("rows", lambda: _rows(joined, run))
    if not is_at_hand(run):
        text = f"{run.model.name} is not on this machine"
        yield Finding("model", "FAIL", text, "Fetch it, or set model in client.toml: --model DIR.")
        return
    yield from _guarded("model", lambda: _model(joined, run, expected))
    yield from _guarded("memory", lambda: _memory(run))


def _why(declined: SilotuneError) -> str:
    """A refusal's reasons, without its first line, which says who refuses."""
    return str(declined).partition("\n")[2].strip()


def _guarded(what: str, check: Callable[[], Finding]) -> Iterator[Finding]:
    """The finding of a check, or what went wrong in it."""
    try:
        yield check()
    except SilotuneError as error:
        first, _, rest = str(error).partition("\n")
        yield Finding(what, "FAIL", first, rest.strip())


def _certificate(joined: Joined) -> Finding:
    ends = certificate_of(joined.kit).not_valid_after_utc
    left = (ends - datetime.datetime.now(datetime.UTC)).days
    mine = fingerprint(public_key(certificate_of(joined.kit)))
    text = f"matches this client's key, {mine}; valid until {ends:%Y-%m-%d}"
    again = "Ask the server's operators to approve request.toml again; that renews the kit."
    if left < 0:
        return Finding("kit", "FAIL", text, again)
    return Finding("kit", "look", text, again) if left < SOON_DAYS else Finding("kit", "ok", text)


def _programs() -> Finding:
    versions = f"silotune {VERSION}, Python {platform.python_version()}"
    try:
        proxy = find_caddy()
        flower = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError as error:
        return Finding("programs", "FAIL", f"{versions}; {error}", "make env EXTRAS=deploy")
    except SilotuneError as error:
        first, _, rest = str(error).partition("\n")
        return Finding("programs", "FAIL", f"{versions}; {first}", rest.strip())
    text = f"{versions}, Flower {flower}, the proxy {proxy}"
    if not flower.startswith(READ):
        fix = f"Install Flower {versions_read()}, with which its bundles can be checked: "
        text += "; with this Flower, `join` does not start"
        return Finding("programs", "FAIL", text, f"{fix}make env EXTRAS=deploy")
    return Finding("programs", "ok", text)


def _server(joined: Joined) -> tuple[Notice, float] | Finding:
    """The server's notice and how long it took, or why there is none."""
    kit, where = joined.kit, f"{joined.kit.host}, port {joined.kit.port}"
    began = time.monotonic()

    def fail(text: str, fix: str) -> Finding:
        return Finding("server", "FAIL", f"{where}: {text}", fix)

    try:
        context = ssl.create_default_context(cadata=kit.authority)
        certificate = Path(joined.own.state) / "certificate.pem"
        make_folder(certificate.parent)
        write_atomically(certificate, kit.certificate.encode("ascii"))
        context.load_cert_chain(certificate, joined.folder / KEY)
        return read_notice(kit, context), time.monotonic() - began
    except urllib.error.HTTPError as error:
        return fail(
            f"answered with HTTP {error.code}", "Is this the consortium's server, and is it up?"
        )
    except SilotuneError as error:  # a proxy that cannot be used
        first, _, fix = str(error).partition("\n")
        return fail(first, fix.strip())
    except (ValueError, KeyError) as error:
        return fail(f"its answer cannot be read: {error}", "Compare the versions of silotune.")
    except OSError as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(why, ssl.SSLCertVerificationError):
            fix = (
                "Something between here and the server shows its own certificate, this is another "
            )
            fix += "server, or its operators have a new authority and a new kit for you: ask them."
            return fail("is not the server of this kit", fix)
        if isinstance(why, ssl.SSLError) or "reset" in str(why).lower():
            fix = "Its operators have not approved this client, or have revoked it: ask them."
            return fail("does not let this client in", fix)
        fix = "Ask the server's operators whether it is up. If it is, ask your network "
        fix += "administrators to allow outgoing TCP to that port, directly or through a proxy in "
        fix += "HTTPS_PROXY that does not open the connection."
        return fail(f"cannot be reached ({why})", fix)


def _clock(notice: Notice) -> Finding:
    difference = time.time() - notice.server_time
    text = f"{abs(difference):.0f} s {'ahead of' if difference > 0 else 'behind'} the server's"
    if abs(difference) < CLOCK_S[0]:
        return Finding("clock", "ok", text)
    worse = abs(difference) >= CLOCK_S[1]
    return Finding("clock", "FAIL" if worse else "look", text, "Set it: timedatectl set-ntp true.")


def _versions(joined: Joined, notice: Notice) -> Finding:
    try:
        check_version(joined.own, notice.version)
    except Declined as error:
        fix = "Add it to limits.versions in client.toml, if your institution agrees, or wait for "
        return Finding("version", "FAIL", _why(error), f"{fix}the server to change.")
    if notice.version == VERSION:
        return Finding("version", "ok", f"{notice.version}, the same as on the server")
    text = f"{VERSION} here, {notice.version} on the server"
    fix = "Upgrade the older of the two, as docs/how-to/maintain.md says."
    return Finding("version", "FAIL", text, fix)


def _disk(joined: Joined) -> Finding:
    state = Path(joined.own.state)
    make_folder(state)
    free = shutil.disk_usage(state).free
    text = f"{human_bytes(free)} free in {state}"
    if free >= FREE_BYTES:
        return Finding("disk", "ok", text)
    return Finding("disk", "look", text, f"Make room for {human_bytes(FREE_BYTES)}.")


def _agree(joined: Joined, recipe: RunConfig) -> Generator[Finding, None, RunConfig | None]:
    """Check the recipe against this client's limits; returns the recipe as it runs here."""
    try:
        run = own_recipe(recipe, joined.own)
    except SilotuneError as error:
        yield Finding("limits", "FAIL", _why(error), "Change [limits] in client.toml, or decline.")
        return None
    algorithm = getattr(run.algorithm, "name", "")
    about = f"{counted(run.rounds, 'round')} of {algorithm} on {recipe.model.name}"
    yield Finding("limits", "ok", f"this client agrees to {about}")
    return run


def _sums(joined: Joined, run: RunConfig) -> Finding:
    identity_of(joined.folder / OWN, joined.own)
    own = joined.own.secure_sum
    others, smallest = len(own.roster.keys() - {joined.own.name}), run.secure_sum.min_cohort
    text = f"knows {counted(others, 'other client')} by fingerprint; takes part in sums over at "
    text += f"least {max(own.min_cohort, smallest)} clients"
    if others + 1 >= max(own.min_cohort, smallest):
        return Finding("sums", "ok", text)
    fix = "Add the fingerprints of the others to [secure_sum] roster in client.toml."
    return Finding("sums", "FAIL", text, fix)


def _rows(joined: Joined, run: RunConfig) -> Finding:
    rows = own_rows(run, joined.own)
    check_steps(run, joined.own, len(rows.train) + rows.num_unused)
    tokenizer = load_tokenizer(run.model)
    give_template(tokenizer, run)
    task, name = build_task(run.task, run.data.labels, run.prefer), joined.own.name
    told = describe_rows({name: rows}, tokenizer, task, run.train.max_length)[name]
    median, most = told.train.tokens["p50"], told.train.tokens["max"]
    text = f"{told.num_train} to train on, {told.num_eval} held out; median {median:.0f} tokens, "
    text += f"at most {most:.0f}"
    if told.train.trained_share is not None:
        text += f"; the loss covers {100 * told.train.trained_share:.0f} % of the tokens"
    if unused := rows.num_unused + rows.num_unused_eval:
        text += f"; {counted(unused, 'further row')} cannot be used"
        return Finding("rows", "look", text, "Compare the recipe's [data] with these rows.")
    if told.train.num_cut or told.train.num_dropped:
        text += f"; {told.train.num_cut} truncated, {told.train.num_dropped} left out"
        fix = f"They are longer than train.max_length = {run.train.max_length}."
        return Finding("rows", "look", text, fix)
    surprises = list(warn_of_template(tokenizer, run, {name: rows}))
    if rows.notes or surprises:
        fix = "Compare these rows with the chat template, see docs/models.md."
        fix = fix if surprises else "Check that the files of [data] are meant so, see docs/data.md."
        return Finding("rows", "look", "; ".join((text, *rows.notes, *surprises)), fix)
    return Finding("rows", "ok", text)


def _model(joined: Joined, run: RunConfig, expected: str | None) -> Finding:
    labels = (run.data.labels or ()) if run.task == "classify" else ()
    _, notes = inspect_base(run.model, labels)  # before the memory check, whose error is shorter
    sha256 = content_hash(folder_of_base(run.model))
    check_base(joined.own, sha256)
    text = f"{run.model.name}, sha256 {sha256[:12]}..." + "".join(f"; {note}" for note in notes)
    if expected is None:
        fix = "The server announces its base model as soon as a run has started."
        return Finding("model", "look", text, fix)
    if sha256 == expected:
        return Finding("model", "ok", f"{text}, the same as on the server")
    fix = "Get the same files: a client with another base is not asked to train."
    return Finding("model", "FAIL", f"{text}; the server has {expected[:12]}...", fix)


def _memory(run: RunConfig) -> Finding:
    import psutil

    # all of these rows belong to this one client
    found = measure(
        run.model_copy(update={"partition": PartitionConfig(kind="iid", num_clients=1)})
    )
    if not isinstance(found, Measurement):
        fix = "Agree on a lower train.batch_size with the server's operators, or free memory."
        return Finding("memory", "FAIL", f"one real step failed: {found}", fix)
    free = psutil.virtual_memory().available
    text = (
        f"one real step of {counted(found.batch.num_rows, 'row')}: {human_bytes(found.peak_bytes)}"
    )
    if found.device == "cuda":
        return Finding("memory", "ok", f"{text} on the GPU")
    text += f" of {human_bytes(free)} free"
    if found.peak_bytes <= free:
        return Finding("memory", "ok", text)
    return Finding("memory", "FAIL", text, "Free memory, or use a machine with more.")
