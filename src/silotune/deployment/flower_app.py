"""The server app of an exported run: `flwr run` starts it, and it does what `silotune run` does.

This is the only file outside runtime/ that imports Flower: here Flower calls us, and it calls an
entire run, which is above every runtime.
"""

import time
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from silotune.federation.progress_lines import PlainProgress
from silotune.federation.run_folder import RunFolder
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.server import drive_app
from silotune.workflows.check import check
from silotune.workflows.run import run_in

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe in the app's config, in a folder named after Flower's number of the run."""
    began = time.perf_counter()
    checked = check(RunConfig.model_validate_json(str(context.run_config["recipe"])))
    place = Path(str(context.run_config["runs"])) / str(context.run_id)
    folder, progress = RunFolder.create(place, checked.run), PlainProgress()
    progress.note(f"run folder: {place}")
    with folder.locked():
        run_in(folder, checked, progress, began=began, drive=partial(drive_app, grid=grid))
