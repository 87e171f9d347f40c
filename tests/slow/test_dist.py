"""`make dist`: what would be published installs elsewhere and runs. Minutes, and needs an index."""

import json
import os
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

HOUSE = Path(__file__).parents[2]


def run(*words: object, **more) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words], env=clean, capture_output=True, text=True, **more
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("dist")
    run("make", "dist", f"DIST={place}", cwd=HOUSE)
    return place


def of_package() -> set[str]:
    """Every file of the package that Git knows."""
    return set(run("git", "ls-files", "src/silotune", cwd=HOUSE).split())


def test_both_archives_hold_every_file_of_the_package(dist):
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = {f"src/{name}" for name in file.namelist() if name.startswith("silotune/")}
    assert names == of_package()
    with tarfile.open(source) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert of_package() <= inside


def test_the_wheel_and_the_source_archive_run_the_demo_in_a_clean_environment(dist, tmp_path):
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    venv.create(tmp_path / "env", with_pip=True)
    python, own = (tmp_path / "env" / "bin" / name for name in ("python", "silotune"))
    install = (python, "-m", "pip", "install", "--quiet", "-c", HOUSE / "requirements.lock")
    run(*install, f"{wheel}[search]", cwd=tmp_path)  # with an extra
    # without scores, which take most of the time
    keys = ("rounds=1", "train.local_steps=1", "report.samples=0", "evaluate.every=0")
    said = run(own, "demo", *keys, "--json", "--out", tmp_path / "r", cwd=tmp_path)
    assert len(json.loads(said)["clients"]) == 5
    assert (tmp_path / "r" / "report.html").is_file()
    recipes = run(own, "recipes", cwd=tmp_path)
    assert recipes.count(" From: ") == len(list((HOUSE / "src/silotune/recipes").glob("*.toml")))
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "silotune", cwd=tmp_path)
    run(*install, "--no-deps", source, cwd=tmp_path)
    again = run(own, "demo", *keys, "--json", "--out", tmp_path / "s", cwd=tmp_path)
    assert json.loads(again)["adapter_sha256"] == json.loads(said)["adapter_sha256"]
    assert run(own, "recipes", cwd=tmp_path) == recipes
