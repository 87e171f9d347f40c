"""The one bundle that a client accepts: our project file, which holds no code, and nothing else.

Flower sends each run's app as a bundle (FAB, a zip file) and puts its folder first on the path of
the process that runs it. Any further file in it could therefore replace an installed module. The
project file names functions of this package; it is the same for every run, as recipes travel as
values. This file imports nothing of Flower's.
"""

import hashlib
import io
import tomllib
import zipfile
from collections.abc import Iterable, Sequence

from silotune.core.errors import EngineError

SERVER = "silotune.runtime.flower.server:app"
APP = """\
[project]
name = "silotune-run"
version = "0.0.0"
[tool.flwr.app]
publisher = "silotune"
[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "silotune.runtime.flower.client:app"
[tool.flwr.app.config]
"""
FAB_ID, FAB_VERSION = "silotune/silotune-run", "0.0.0"
"""What Flower makes of publisher, name and version; a run names its bundle by them."""
TOLD = ("recipe", "run", "base_sha256", "version")
"""What the server app and every client receive, as texts. Another key is another bundle, which the
clients of earlier versions refuse."""
READ = ("1.41.", "1.42.")
"""Versions of Flower whose SuperNode was read, by how they begin; no other one is started."""
PROJECT, MANIFEST = "pyproject.toml", ".info/CONTENT"
MOST_BYTES = 64 * 1024
"""Neither the bundle nor a file in it is larger; a larger one is not read."""


class BundleError(EngineError):
    """What the server wants to start at a client is not the bundle that this package makes."""


def versions_read() -> str:
    """The versions of Flower that clients start, in words."""
    return " or ".join(f"{start}x" for start in READ)


def app_of(server: str) -> str:
    """The pyproject of a Flower app, up to its config: no code, only names of functions."""
    return APP.format(server=server)


def project_file(told: Iterable[str]) -> str:
    """The whole project file of a run whose config has these keys."""
    return app_of(SERVER) + "".join(f'{key} = ""\n' for key in told)


def check_bundle(content: bytes) -> None:
    """Compare a bundle with the only one that is allowed, without unpacking it to disk.

    The zip file's own bytes are not compared: they depend on the server's compression library.

    Raises:
        BundleError: It is another one; says in what.
    """
    if len(content) > MOST_BYTES:
        raise BundleError(f"the bundle has {len(content)} bytes")
    try:
        project, manifest = _files(content)
        found = tomllib.loads(project.decode("utf-8"))
    except BundleError:
        raise
    except Exception as error:  # damaged, encrypted, no TOML: whatever it is, it is not ours
        raise BundleError(f"the bundle cannot be read ({type(error).__name__})") from None
    expected = tomllib.loads(project_file(TOLD))
    if found != expected:
        raise BundleError(
            f"the bundle's {PROJECT} differs in {_shown(_differing(found, expected))}"
        )
    line = f"{PROJECT},{hashlib.sha256(project).hexdigest()},{8 * len(project)}"
    if manifest != line.encode():
        raise BundleError(f"the bundle's {MANIFEST} is not that of its {PROJECT}")


def _files(content: bytes) -> list[bytes]:
    """The project file and the manifest, if the zip file holds just these."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [info.orig_filename for info in archive.infolist()]
        if sorted(names) != sorted((PROJECT, MANIFEST)):
            raise BundleError(f"the bundle holds {_shown(names)}")
        found: list[bytes] = []
        for name in (PROJECT, MANIFEST):
            with archive.open(name) as file:
                found.append(file.read(MOST_BYTES + 1))
            if len(found[-1]) > MOST_BYTES:
                raise BundleError(f"the bundle's {name} is too large")
        return found


def _differing(found: object, expected: object, at: str = "") -> Sequence[str]:
    """The keys in which two tables differ."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return [] if found == expected else [at]
    keys = sorted(found.keys() | expected.keys())
    return [
        name
        for key in keys
        for name in _differing(found.get(key), expected.get(key), f"{at}.{key}".strip("."))
    ]


def _shown(names: Sequence[str]) -> str:
    """At most five names that the server chose, quoted."""
    shown = ", ".join(ascii(name[:100]) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
