"""What lies in deploy/ is well formed, runs commands that exist, and asks for no more than needed.

No container engine runs here: files are read, and judged by the tools that are installed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE

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


def exposure(unit: Path) -> float:
    """What `systemd-analyze security` says: from 0 (nothing is exposed) to 10."""
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


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
    assert unit(side)["RestartSec"] == "15", "docs/deploy.md says so"


def test_the_engine_counts_a_killed_client_as_present_for_as_long_as_the_page_says():
    """The page said 15 s, which is only the pause before systemd restarts it."""
    assert HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == 60
    page = " ".join((DEPLOY.parent / "docs" / "deploy.md").read_text().split())
    assert "the engine counts a killed SuperNode as present for up to a minute" in page


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


# --- what a captured process could do ------------------------------------------------------------

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@needs_systemd
@pytest.mark.parametrize("side", SIDES)
def test_systemd_rates_the_exposure_of_both_units_below_3(side):
    """They were rated 5.5 and 5.8."""
    assert exposure(DEPLOY / "systemd" / f"silotune-{side}.service") < 3


@needs_systemd
def test_a_client_with_a_gpu_is_rated_below_3_too(tmp_path):
    service = shutil.copy(DEPLOY / "systemd" / "silotune-client.service", tmp_path)
    without = exposure(Path(service))
    drop_in = tmp_path / "silotune-client.service.d"
    drop_in.mkdir()
    shutil.copy(DEPLOY / "systemd" / "gpu.conf", drop_in)
    assert without < exposure(Path(service)) < 3


@needs_systemd
@pytest.mark.parametrize("side", SIDES)
def test_systemd_accepts_each_line_of_the_units(side, tmp_path):
    """Only the program's path is replaced, because it must exist for this check."""
    text = (DEPLOY / "systemd" / f"silotune-{side}.service").read_text()
    path = tmp_path / f"silotune-{side}.service"
    path.write_text(text.replace("/opt/silotune/bin/silotune", shutil.which("true") or ""))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if "silotune" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("side", SIDES)
def test_each_way_of_deploying_has_the_same_limit_of_memory(side):
    """None had one: a client that trains on a shared machine could take all of its memory."""
    (container,) = pod(side)["containers"]
    limit = container["resources"]["limits"]["memory"]
    assert re.fullmatch(r"\d+Gi", limit)
    assert unit(side)["MemoryMax"] == limit.removesuffix("i")
    assert compose(side)["mem_limit"] == limit.removesuffix("Gi") + "g"
    assert unit(side)["TasksMax"] == str(compose(side)["pids_limit"])


def test_what_a_unit_writes_is_its_owners_alone():
    for side in SIDES:
        assert unit(side)["UMask"] == "0077"
    assert "install -d -m 0700" in (DEPLOY / "Dockerfile").read_text()


def test_a_client_may_reach_the_servers_port_and_names_and_nobody_may_reach_it():
    text = (DEPLOY / "kubernetes" / "client" / "client.yaml").read_text()
    (policy,) = [d for d in yaml.safe_load_all(text) if d["kind"] == "NetworkPolicy"]
    spec = policy["spec"]
    (labels,) = [
        d["spec"]["template"]["metadata"]["labels"]
        for d in yaml.safe_load_all(text)
        if d["kind"] == "StatefulSet"
    ]
    assert spec["podSelector"]["matchLabels"] == labels, "it applies to the client"
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert spec["ingress"] == []
    ports = {(p["protocol"], p["port"]) for rule in spec["egress"] for p in rule["ports"]}
    assert ports == {("TCP", 8443), ("UDP", 53), ("TCP", 53)}
    for rule in spec["egress"]:
        assert rule["to"], "a rule without addresses allows all of them"
        if any(p["port"] == 53 for p in rule["ports"]):
            assert all("namespaceSelector" in to and "podSelector" in to for to in rule["to"])


# --- where the image's parts come from -----------------------------------------------------------


def test_the_base_image_can_only_be_named_by_its_digest():
    """`python:3.11-slim-bookworm` was whatever the registry served that day."""
    text = (DEPLOY / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert base.endswith("@${PYTHON_DIGEST}"), "an empty or a wrong one is no image's name"
    assert re.search(r"^ARG PYTHON_DIGEST$", text, re.MULTILINE), "a digest given here would age"
    for side in SIDES:
        assert compose(side)["build"]["args"] == ["PYTHON_DIGEST"]


def test_each_install_asks_one_index():
    """With two, whoever uploads the higher version to either of them is installed."""
    joined = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"^RUN (pip install.*)$", joined, re.MULTILINE)
    assert len(installs) == 2
    assert "--extra-index-url" not in joined
    for words in installs:
        if "--index-url" in words:
            assert "--no-deps" in words, "nothing but torch from PyTorch's index"
            assert re.search(r"\^torch==", words)


def test_the_list_of_packages_is_the_locks():
    """`make lock` writes both; whoever edits one by hand is told here."""
    sbom = json.loads((DEPLOY / "sbom.cdx.json").read_text())
    lock = (DEPLOY.parent / "requirements.lock").read_text().split()
    assert sorted(f"{c['name']}=={c['version']}".lower() for c in sbom["components"]) == sorted(
        line.lower() for line in lock
    )
    refs = {c["bom-ref"] for c in sbom["components"]} | {"silotune"}
    for own in sbom["dependencies"]:
        assert {own["ref"], *own["dependsOn"]} <= refs
    assert sum("licenses" in c for c in sbom["components"]) > 0.9 * len(lock)


def test_the_list_of_packages_names_no_machine():
    text = (DEPLOY / "sbom.cdx.json").read_text()
    assert not re.search(r"https?:|file:|\"/|\+cpu|\+cu", text)
    assert str(DEPLOY.parent) not in text
    assert os.uname().nodename not in text
