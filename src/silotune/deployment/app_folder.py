"""`silotune export-app`: a run as a Flower app, for people who want `flwr run`.

The app holds no code: its components are those of the installed package, and its config is the
recipe. It runs in Flower's simulation; real clients join a consortium.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from silotune.core.atomic_files import build_folder
from silotune.core.errors import ConfigError
from silotune.data.files import locate
from silotune.federation.client_config import is_client_folder
from silotune.federation.roster import is_consortium
from silotune.recipes.parse import load_recipe
from silotune.runtime.flower.bundle import app_of
from silotune.runtime.flower.submit import with_absolute_paths
from silotune.workflows.check import check

SERVER = "silotune.deployment.flower_app:app"
README = """\
# A silotune run as a Flower app

```sh
{command}
```

silotune must be installed wherever Flower's processes run. Each run leaves a run folder, named
after Flower's number of the run, in {runs}. `silotune report`, `silotune export`
and the other commands work on it, and `silotune run --resume` resumes an interrupted run.

The recipe is in pyproject.toml as one line of JSON. To run another recipe, export again.
"""


def export_app(folder: Path, recipe: str | Path, overrides: Sequence[str] = ()) -> str:
    """Write a run as a Flower app.

    Args:
        folder: Folder to create; it must not exist.
        recipe: A shipped name or a TOML file, with rows to split into clients.
        overrides: Dotted `key=value` texts on top of it.

    Returns:
        The command that runs it.

    Raises:
        SilotuneError: The recipe has a mistake, or is for real clients.
    """
    if folder.exists():
        raise ConfigError(f"{folder} already exists.\n  Choose another folder.")
    place = locate(load_recipe(recipe, overrides).data.path)
    if place is not None and (is_client_folder(place) or is_consortium(place)):
        raise ConfigError(
            "this recipe is for real clients, but an exported Flower app runs in simulation.\n"
            "  Real clients join a consortium: silotune server init. To try it: silotune rehearse."
        )
    checked = check(recipe, [*overrides, "runtime.name=flower-simulation"])
    run, names = with_absolute_paths(checked.run), sorted(checked.rows)
    # next to the app: everything in its folder is sent along with it
    runs = folder.absolute().with_name(f"{folder.name}-runs")
    told = {
        "recipe": run.model_dump_json(serialize_as_any=True),
        "clients": json.dumps(names),
        "runs": str(runs),
    }
    wanted = {
        "num-supernodes": len(names),
        "client-resources-num-cpus": run.runtime.client_cpus or run.runtime.threads,
        "client-resources-num-gpus": float(run.runtime.client_gpus or 0),
    }
    resources = " ".join(f"{key}={value}" for key, value in wanted.items())
    words = ["flwr", "run", str(folder), "--stream", "--federation-config", resources]
    command = shlex.join(words)

    def fill(part: Path) -> None:
        text = app_of(SERVER) + tomli_w.dumps(told)
        (part / "pyproject.toml").write_text(text, encoding="utf-8")
        readme = README.format(command=command, runs=runs)
        (part / "README.md").write_text(readme, encoding="utf-8")

    build_folder(folder, fill)
    return command
