"""`silotune pretrain-teacher`: train the teacher on the server's rows before any run."""

from collections.abc import Sequence
from pathlib import Path

from silotune.core.errors import ConfigError
from silotune.core.public_call import public
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.server_work import is_pretrained, pretrain, server_rows
from silotune.recipes.schema import RunConfig
from silotune.workflows.check import check
from silotune.workflows.folders import place_for


@public
def pretrain_teacher(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a recipe's teacher for the task on the server's own rows, before any run.

    Args:
        recipe: A shipped name, a TOML file or a config, with `distill.teacher`, rows of the server
            and `distill.pretrain_epochs`.
        overrides: Dotted `key=value` strings that change it.
        out: The model folder to create; by default `runs/<time>-<recipe>-teacher`.
        progress: Receives progress messages; silent by default.

    Returns:
        A plain model folder for `distill.teacher` of later runs. Its teacher.json says how it was
        made. If the clients' rows are on this machine, it also says how well the teacher does on
        the held-out ones.

    Raises:
        SilotuneError: The teacher cannot be trained; nothing incomplete is left behind.
    """
    checked = check(recipe, overrides)
    run, distill = checked.run, checked.run.distill
    own = server_rows(run)
    if distill.teacher is None or distill.pretrain_epochs == 0 or not own:
        raise ConfigError(
            "pre-training a teacher needs distill.teacher, distill.pretrain_epochs of at least 1, "
            "and rows of the server (server.data_fraction or server.data_path).\n"
            "  Set what is missing, for example distill.pretrain_epochs=3."
        )
    if is_pretrained(distill.teacher):
        raise ConfigError(
            f"distill.teacher = '{distill.teacher}' has already learned the task.\n"
            "  Set distill.teacher to the model that it was trained from."
        )
    place = place_for(recipe, out, "-teacher")
    held_out = [row for client in checked.rows.values() for row in client.scored]
    pretrain(
        run,
        place,
        progress or Progress(),
        rows=own,
        # loading the student first shows early whether it can be loaded
        tokenizer=load_for(run).tokenizer,
        held_out=held_out,
    )
    return place
