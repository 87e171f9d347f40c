"""Both commands install what requirements.lock pins, and the lock is plain."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
NOT_LOCKED = {"silotune", "pip", "setuptools", "wheel"}
BROUGHT_BY_CUDA_TORCH = re.compile(r"^(nvidia|cuda|triton)")  # pinned by torch itself


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    return {plain(line.split("==")[0]): line.split("==")[1] for line in LOCK}


def test_every_line_is_a_name_and_a_version():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line) for line in LOCK)
    assert sorted(LOCK, key=str.lower) == LOCK


def test_torch_is_the_version_that_was_asked_for():
    assert locked()["torch"] == "2.13.0"


def test_everything_that_is_installed_is_locked_in_that_version():
    for distribution in metadata.distributions():
        name = plain(distribution.name)
        if name not in NOT_LOCKED and not BROUGHT_BY_CUDA_TORCH.match(name):
            version = distribution.version.split("+")[0]
            assert locked().get(name) == version, f"{name} {version} is not what is locked"


def test_every_direct_dependency_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {plain(re.match(r"[A-Za-z0-9._-]+", line).group(0)) for line in wanted}
    assert names - {"silotune"} <= set(locked())  # one extra may name others


def test_the_makefile_installs_with_the_lock_only():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    # they write the lock, what follows from it, and archives that hold nothing of what is installed
    apart = (".lock-venv", ".sbom-venv", ".dist-venv")
    assert all("-c requirements.lock" in x or any(v in x for v in apart) for x in installs)
