"""What lies in deploy/ is well formed, runs commands that exist, and asks for no more than needed.

No container engine runs here: files are read, and judged by the tools that are installed.
"""

import json
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from silotune.runtime.flower.kept_processes import program

with warnings.catch_warnings():
    # typer 0.20.1 imports a name that click 8.5 calls deprecated
    warnings.filterwarnings("ignore", message="'click.utils", category=DeprecationWarning)
    import click
    import typer.main

    from silotune.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
SIDES = ("server", "client")
UID = 10001


def compose(side: str) -> dict:
    table = yaml.safe_load((DEPLOY / side / "compose.yaml").read_text())
    (service,) = table["services"].values()
    return service


def pod(side: str) -> dict:
    path = DEPLOY / "kubernetes" / side / f"{side}.yaml"
    (kind,) = [d for d in yaml.safe_load_all(path.read_text()) if d["kind"] == "StatefulSet"]
    assert kind["spec"]["replicas"] == 1
    return kind["spec"]["template"]["spec"]


def unit(side: str) -> dict[str, str]:
    text = (DEPLOY / "systemd" / f"silotune-{side}.service").read_text()
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


def parses(words: list[str]) -> bool:
    """Whether the command line takes these words; nothing is run."""
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        if found is None:
            return False
        command, words = found, words[1:]
        context = click.Context(command, parent=context)
    command.make_context(words[0] if words else "", list(words), parent=context.parent)
    return True


@pytest.mark.parametrize("side", SIDES)
def test_each_way_of_deploying_runs_a_command_that_exists(side):
    (container,) = pod(side)["containers"]
    started = unit(side)["ExecStart"]
    for words in (compose(side)["command"], container["args"], shlex.split(started)[1:]):
        assert words[0] == side
        assert parses(list(words)), words


def test_commands_in_comments_exist_too():
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            for line in re.findall(
                r"(?:compose (?:run --rm|exec) \w+|^#\s+)(?: silotune)? ((?:server|client) .*)",
                path.read_text(),
                re.MULTILINE,
            ):
                words = shlex.split(line.replace(" ...", ""))
                assert parses(words), (path.name, line)


@pytest.mark.parametrize("side", SIDES)
def test_nothing_runs_as_root_or_may_become_it(side):
    service, spec = compose(side), pod(side)
    assert service["user"] == f"{UID}:{UID}"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == UID
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    own = unit(side)
    assert own["User"] == "silotune"
    assert own["NoNewPrivileges"] == "true"
    assert own["ProtectSystem"] == "strict"
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"USER {UID}:{UID}" in dockerfile
    assert "HF_HUB_OFFLINE=1" in dockerfile


def test_rows_can_be_read_and_not_changed():
    assert "./data:/data:ro" in compose("client")["volumes"]
    (container,) = pod("client")["containers"]
    (data,) = [m for m in container["volumeMounts"] if m["name"] == "data"]
    assert data["readOnly"] is True
    assert unit("client")["ReadOnlyPaths"] == "/srv/data"


@pytest.mark.parametrize("side", SIDES)
def test_what_ends_is_started_again_and_looked_after(side):
    assert compose(side)["restart"] == "always"
    assert compose(side)["healthcheck"]["test"]
    (container,) = pod(side)["containers"]
    assert container["livenessProbe"]
    assert unit(side)["Restart"] == "always"
    assert int(unit(side)["RestartSec"]) >= 15, "the engine holds a client for present so long"


def test_the_server_opens_one_port_and_the_client_none():
    assert compose("server")["ports"] == ["8443:8443"]
    assert "ports" not in compose("client")
    (container,) = pod("server")["containers"]
    assert [p["containerPort"] for p in container["ports"]] == [8443]
    (container,) = pod("client")["containers"]
    assert "ports" not in container


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("side", SIDES)
def test_kustomize_builds_the_manifests(side):
    words = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / side)]
    built = subprocess.run(words, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    kinds = [d["kind"] for d in yaml.safe_load_all(built.stdout)]
    assert "StatefulSet" in kinds


@pytest.mark.parametrize("side", SIDES)
def test_every_manifest_is_what_kubernetes_takes_and_has_no_other_key(side):
    text = (DEPLOY / "kubernetes" / side / f"{side}.yaml").read_text()
    manifests = list(yaml.safe_load_all(text))
    assert manifests
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.37", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError, match="specs"):
            kubernetes_validate.validate({**manifest, "specs": {}}, "1.37", strict=True)


@pytest.mark.parametrize("side", SIDES)
def test_docker_compose_reads_the_file_as_we_mean_it(side):
    words = [program("docker-compose"), "-f", str(DEPLOY / side / "compose.yaml"), "config"]
    done = subprocess.run([*words, "--format", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "it warns of nothing"
    (service,) = json.loads(done.stdout)["services"].values()
    assert service["command"] == compose(side)["command"]
    read_only = {v["target"] for v in service["volumes"] if v.get("read_only")}
    assert read_only == {"/models"} | ({"/data"} if side == "client" else set())


def test_hadolint_finds_nothing_in_the_dockerfile():
    words = [program("hadolint"), str(DEPLOY / "Dockerfile")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
