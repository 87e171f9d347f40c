"""A consortium whose clients need not trust the server: asked for consent, and under masks.

Each machine is a network namespace with its own address and home, and the commands are those of
docs/deploy.md and docs/secure-sums.md. First an honest run, with a client that is killed in
mid-round. Then the server's operator edits his copy of silotune, or his files, and tries to read an
update, to add a client of his own, to change a recipe after consent, and to send other code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2

import silotune
from silotune.core.checksums import FILE as CHECKSUMS
from silotune.federation.operator_log import ASKS, BUNDLE_REFUSED, REFUSED, entries
from silotune.federation.outbound_log import FILE as OUTBOUND
from silotune.federation.spool import read_update
from tests.slow.network import Machine, missed, rounds_with, usable, wait_for
from tests.slow.test_administrators_trial import Trial, note

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not usable(), reason="needs root, `ip`, and network namespaces"),
]
NAMES = ("north", "south", "east", "west")
"""Of four clients one may drop out, if each of them accepts sums over three."""
SLOW_S = 900
"""Every message starts a process at every client, all on this machine."""
KEYS = (
    "secure_sum.kind=masks secure_sum.range=1.0 secure_sum.min_cohort=3 evaluate.every=0 "
    "algorithm.weights=uniform runtime.join_timeout_s=600 sampling.timeout_s=240"
)


class Wary(Trial):
    """Four clients that know each other, ask for consent, and accept nothing but sums."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keys=KEYS)
        self.clients: dict[str, Machine] = {}

    def prepare(self, client: Machine, roster: dict[str, str], *, ask: bool = True) -> None:
        """Write client.toml as docs/deploy.md and docs/secure-sums.md say."""
        own = client.home / client.name / "client.toml"
        said = client.try_(f"silotune client doctor {client.name}-kit.toml {ROWS}").stdout
        assert own.is_file(), said
        others = "".join(f'{n} = "{text}"\n' for n, text in roster.items() if n != client.name)
        table = "[secure_sum]\nrequired = true\nmin_cohort = 3\n\n[secure_sum.roster]\n" + others
        text = own.read_text().replace('# approve = "ask" ', 'approve = "ask"   ' if ask else "# ")
        own.write_text(f"{text}\n{table}")

    def approve(self, run: Path, *clients: Machine) -> None:
        """Each client's people read what the run asks for, and agree."""
        wait_for("the run to begin", (run / "run-id").is_file, SLOW_S)
        id_ = (run / "run-id").read_text()[:8]
        for client in clients:
            wait_for(
                f"{client.name} to be asked",
                lambda own=client: f"run {id_} waits for your consent" in joined(own),
                SLOW_S,
                told=lambda own=client: joined(own) + self.server.said("server up"),
            )
        for client in clients:
            self.answer(client, id_, "--yes")

    def answer(self, client: Machine, run: str, word: str) -> str:
        """What a client's people read, after they have answered."""
        said = client.do(f"silotune client approve {run} --folder {client.name} {word}")
        assert "only clients on your roster" in said, said
        return said

    def restart_server(self, code: Path | None = None) -> None:
        self.server.end("server up")
        environment = {"PYTHONPATH": os.pathsep.join([str(code), *OWN_PATH])} if code else None
        self.server.start("silotune server up", environment)

    def stop(self, run: Path) -> None:
        self.server.do(f"silotune server stop {run.name}")
        self.wait_until(run, "stopped", SLOW_S)


ROWS = "--data rows.jsonl --model model"
OWN_PATH = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def joined(client: Machine) -> str:
    """All that `join` has printed."""
    return client.said("client join")


def wait_for_refusal(trial: Wary, client: Machine, why: str, what: str = REFUSED) -> str:
    """A refusal, in the log of operators and in what `join` prints."""

    def found() -> list[str]:
        rows = entries(client.home / client.name, what)
        return [row["why"] for row in rows if why in row["why"]]

    def told() -> str:
        rows = (client.home / client.name / "operators.jsonl").read_text()
        return f"{joined(client)}\n{rows}\n{trial.server.said('server up')}"

    wait_for(f"'{why}' in the log of {client.name}", found, SLOW_S, told=told)
    wait_for(f"'{why}' at {client.name}", lambda: why in joined(client), 60, told=told)
    assert "as written" in client.do(f"silotune audit-log verify {client.name}")
    return found()[0]


def edited(trial: Wary, name: str, file: str, line: str, own: str) -> Path:
    """The operator's copy of silotune, with a line of his own."""
    place = trial.server.home / name
    shutil.copytree(Path(silotune.__file__).parent, place / "silotune")
    path = place / "silotune" / file
    text = path.read_text()
    assert text.count(line) == 1, f"{file} has changed: {line}"
    path.write_text(text.replace(line, own))
    return place


def told_of(trial: Wary, run: Path) -> str:
    """What a person would read if something hangs."""
    log = run / "job.log"
    return trial.server.said("server up") + (log.read_text() if log.exists() else "")


def last_asked(client: Machine) -> str:
    path = client.home / client.name / "state" / OUTBOUND
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((row["asked"] for row in reversed(rows) if "run" in row), "")


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Iterator[Wary]:
    made = Wary(tmp_path_factory.mktemp("wary"))
    try:
        for number, name in enumerate(NAMES):
            made.clients[name] = made.add(name, number)
        for client in made.clients.values():
            made.prepare(client, made.fingerprints)
            made.join(client)
        made.wait_until_connected(*made.clients.values())
        yield made
    finally:
        made.network.close()


def test_a_client_is_killed_in_mid_round_and_what_the_server_gets_is_noise(trial):
    """The files in which the server keeps updates until a round is over are copied in between."""
    clients, west = trial.clients, trial.clients["west"]
    run = trial.submit("rounds=5 train.local_steps=4")
    trial.approve(run, *clients.values())
    kept = trial.server.home / "copied"
    kept.mkdir()

    def copied() -> bool:
        for path in (run / "spool").glob("round-00001/*.safetensors"):
            if not (kept / path.name).exists():
                shutil.copyfile(path, kept / path.name)
        return len(list(kept.iterdir())) == len(NAMES)

    wait_for("all updates", copied, SLOW_S, told=lambda: told_of(trial, run))
    # with this answer it opens the first sum, and has shared its secrets for the next round
    wait_for("west to share", lambda: last_asked(west) == "query.open", SLOW_S)
    west.crash()
    trial.wait_for_round(run, 2, SLOW_S)
    west.link("up")
    trial.join(west)
    trial.wait_until(run, "done", SLOW_S)
    note(f"west was killed in round 2: {'; '.join(missed(run))}")
    for name in NAMES:
        there = rounds_with(run, name)
        assert there[-1] == 5, (name, missed(run))
        assert (2 in there) == (name != "west"), (name, missed(run))

    words = [next(iter(read_update(path).delta.values())).numpy() for path in kept.iterdir()]
    starts = np.concatenate([each.view(np.uint32) >> 28 for each in words])  # the first four bits
    expected = len(starts) / 16
    distance = ((np.bincount(starts, minlength=16) - expected) ** 2 / expected).sum()
    note(f"{len(starts)} words, of 16 kinds by their first bits: chi-square {distance:.1f}")
    assert distance < chi2.ppf(1 - 1e-6, 15)


def test_a_server_that_asks_for_plain_updates_is_refused_before_anybody_is_asked(trial):
    run = trial.submit(
        "rounds=1 secure_sum.kind=none secure_sum.range=none secure_sum.min_cohort=4"
    )
    for client in trial.clients.values():
        said = wait_for_refusal(trial, client, "this client requires it")
    note(said)
    trial.stop(run)


def test_a_server_that_opens_a_sum_twice_and_then_changes_the_recipe_gets_nothing(trial):
    """He asks again, for everybody but the first: the difference would be the first one's.

    Then he edits the recipe to which everybody has agreed.
    """
    line = "        if shares and shares.keys() == next_.keys():\n"
    more = (
        '        fewer = {"round": round_, "survivors": list(survivors)[1:]}\n'
        '        list(self._ask("query.open", dict.fromkeys(survivors, fewer)))\n'
    )
    trial.restart_server(edited(trial, "reads", "runtime/sum_relay.py", line, more + line))
    run = trial.submit("rounds=30 train.local_steps=1")
    trial.approve(run, *trial.clients.values())
    for client in trial.clients.values():
        said = wait_for_refusal(trial, client, "has already given its shares for round 1")
    note(said)

    trial.stop(run)
    trial.restart_server()
    recipe, sums = run / "recipe.toml", run / CHECKSUMS
    recipe.write_text(recipe.read_text().replace("local_steps = 1\n", "local_steps = 40\n"))
    again = trial.server.try_(f"silotune server submit --again {run.name}")
    assert again.returncode != 0, "his own silotune notices"
    note(again.stderr)
    # so he writes the hash of the new recipe over that of the old one
    new = hashlib.sha256(recipe.read_bytes()).hexdigest()
    sums.write_text(re.sub(r"^[0-9a-f]{64}(?=  recipe\.toml$)", new, sums.read_text(), flags=re.M))
    trial.server.do(f"silotune server submit --again {run.name}")
    before = max(rounds_with(run, "north"))
    id_ = (run / "run-id").read_text()[:8]
    for client in trial.clients.values():
        wait_for(
            f"{client.name} to be asked again",
            lambda own=client: "because its recipe has changed since you answered" in joined(own),
            SLOW_S,
            told=lambda own=client: joined(own) + told_of(trial, run),
        )
        rows = [row for row in entries(client.home / client.name, ASKS) if "why" in row]
        (line,) = [row["why"] for row in rows if row["run"].startswith(id_)]
        assert line == "its recipe has changed since it was approved"
        assert "40 steps" in trial.answer(client, id_, "--no")
    note(line)
    assert max(rounds_with(run, "north")) == before
    trial.stop(run)


def test_other_code_is_not_started(trial):
    """A module that takes the place of the client app."""
    mark = trial.server.home / "it-ran"
    evil = (
        f"from pathlib import Path\nPath({str(mark)!r}).write_text('it ran')\n"
        "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    )
    line = 'project_file(told), encoding="utf-8")'
    more = (
        'project_file(told).replace("silotune.runtime.flower.client", "evil"), encoding="utf-8")\n'
        f'        (app / "evil.py").write_text({evil!r})'
    )
    trial.restart_server(edited(trial, "sends", "runtime/flower/submit.py", line, more))
    run = trial.submit("rounds=1 runtime.join_timeout_s=30")
    for client in trial.clients.values():
        said = wait_for_refusal(trial, client, "the bundle", BUNDLE_REFUSED)
    note(said)
    assert not mark.exists()
    trial.stop(run)
    trial.restart_server()


@pytest.mark.parametrize("attack", ["a new name", "the name of a member"])
def test_a_client_of_the_operators_own_is_refused_by_the_others(trial, attack):
    """He has the authority's key, so his client has a certificate like everybody else's."""
    name, why = "mallory", "'mallory' is not on this client's roster"
    if attack == "the name of a member":
        name, why = "south", "the key that came as that of 'south' has the fingerprint"
        trial.server.do("silotune server revoke south")
        trial.clients.pop("south").end("client join")
    honest, roster = dict(trial.clients), dict(trial.fingerprints)
    own = trial.add(name, 3, machine=f"his-{name}")
    trial.prepare(own, roster, ask=False)
    trial.join(own)
    trial.wait_until_connected(own)
    run = trial.submit("rounds=1")
    trial.approve(run, *honest.values())
    for client in honest.values():
        said = wait_for_refusal(trial, client, why)
    note(said)
    trial.stop(run)
    assert not rounds_with(run, "north")
    trial.server.do(f"silotune server revoke {name}")
    own.end("client join")
