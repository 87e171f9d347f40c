"""Was it worth joining? Train and score every arm of a comparison on the same held-out rows.

The arms: the untouched base; each client alone, with exactly as many examples as it takes in the
federated run; the federated run, with one or several algorithms; all rows in one place, with as
many examples as all clients together. Every arm first tries the same number of settings on
validation rows. Seeds are paired: with one seed, every arm gets the same first adapter, cohorts and
order of rows. `_compare` is the protocol.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core.atomic_files import write_atomically, write_json
from silotune.core.errors import ConfigError, DataError, RunFolderError
from silotune.core.public_call import as_path, public
from silotune.core.wording import did_you_mean
from silotune.data.clients import load_clients
from silotune.federation.progress import Progress
from silotune.models.base_files import public_name
from silotune.recipes.arms import federated_arms
from silotune.recipes.parse import resolve_recipe
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import FinishConfig
from silotune.results.frames import frame
from silotune.results.paper import TableKind, check_kinds, write_charts, write_tables
from silotune.results.svg import ChartKind, saving
from silotune.training.own_functions import own_loss
from silotune.training.tasks import build_task
from silotune.workflows.check import Checked
from silotune.workflows.compare.arms import Arms
from silotune.workflows.compare.best import choose_best
from silotune.workflows.compare.card import comparison_card
from silotune.workflows.compare.folder import (
    ComparisonFolder,
    Places,
    places,
    read_costs,
    read_rounds,
    read_scores,
    read_shares,
    read_validation,
    results,
    seeds_of,
)
from silotune.workflows.compare.held_out import samples
from silotune.workflows.compare.local_training import Plan, pooled, rows_trained
from silotune.workflows.compare.names import RESULT
from silotune.workflows.compare.numbers import cost_numbers, score_numbers, text_tables
from silotune.workflows.compare.own_arms import go_on
from silotune.workflows.compare.page import comparison_page
from silotune.workflows.compare.statistics import Scores, compare_arms
from silotune.workflows.compare.tuning import Chosen, choose
from silotune.workflows.compare.verdicts import choice_notes, finish_notes
from silotune.workflows.data_overview import describe_split
from silotune.workflows.folders import open_folder, place_for
from silotune.workflows.in_memory import keep_beside

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Comparison:
    """A finished comparison on disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "path", as_path(self.path, "Comparison")
        )  # strings are accepted too

    @property
    def result(self) -> dict[str, Any]:
        """comparison.json: means, differences, intervals, verdicts, costs; see docs/compare.md."""
        result = ComparisonFolder.open(self.path).read_json("comparison.json")
        if result is None:
            raise RunFolderError(
                f"{self.path} is not finished.\n  Resume it: silotune compare --resume {self.path}"
            )
        return result

    def table(self) -> "DataFrame":
        """One row per client, metric and arm; the means over clients come last.

        Columns: client, metric, arm; mean, low and high of the score; difference, difference_low
        and difference_high from training alone; verdict. Missing values are not known, such as an
        interval from too few rows. Losses are in nats per token (classify: per row).
        """
        return frame(score_numbers(self.result))

    @public
    def report(self, *, charts: ChartKind | None = None, tables: TableKind | None = None) -> Path:
        """Write report.html: the comparison on one page that needs no network. Returns its path.

        Args:
            charts: Also write every chart as a file, into charts/.
            tables: Also write the tables, into tables/: "csv" unrounded, "latex" as on the page.
        """
        check_kinds(charts, tables)
        folder, result = ComparisonFolder.open(self.path), self.result
        with saving(charts) as saved:
            page = comparison_page(
                result,
                run=folder.run,
                provenance=folder.read_json("provenance.json"),
                split=result["split"],
                samples=result["samples"],
            )
        write_atomically(self.path / "report.html", page.encode())
        write_charts(self.path, saved)
        write_tables(
            self.path,
            tables,
            numbers=lambda: {"scores": self.table(), "costs": frame(cost_numbers(result))},
            texts=lambda: text_tables(result),
        )
        return self.path / "report.html"


@public
def compare(
    recipe: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
    rows: Any = None,
    model: Any = None,
) -> Comparison:
    """Train and score all arms, or resume an interrupted comparison.

    Args:
        recipe: A shipped name, a TOML file or a config; its [compare] says what to compare.
        overrides: Dotted `key=value` strings that change it, for example "compare.seeds=5".
        out: The folder to create; by default `runs/<time>-<recipe>`. Never overwritten.
        resume: A comparison to resume, with its own recipe.
        progress: Receives progress messages; silent by default.
        rows: Rows in memory, instead of data.path: a list of dicts, a data set, a data frame, an
            iterator, or {client: rows}. They are written beside the run folder.
        model: A transformers model and its tokenizer in memory, instead of model.name. It is saved
            like the rows and not changed.

    Raises:
        SilotuneError: The comparison cannot be made. Finished parts stay in the folder.
    """
    progress = progress or Progress()
    overrides = keep_beside(out, rows, model, overrides, resume)
    if recipe is not None:
        out = place_for(recipe, out) if resume is None else out
        recipe, overrides = with_validation(resolve_recipe(recipe, overrides)), ()
    folder, checked = open_folder(ComparisonFolder, recipe, overrides, out=out, resume=resume)
    try:
        groups = _check(checked)
        with folder.locked():
            return _compare(folder, checked, groups, progress)
    except (ConfigError, DataError):
        if resume is None and not (folder.path / "base").exists():
            folder.remove()
        raise
    except BaseException:
        progress.note(f"to continue: silotune compare --resume {folder.path}")
        raise


def with_validation(run: RunConfig) -> RunConfig:
    """The recipe of a comparison: with validation rows, if anything is to be chosen by them."""
    if run.compare.tune is False or run.data.validation_fraction > 0:
        return run
    fraction = {"validation_fraction": run.compare.validation_fraction}
    return run.model_copy(update={"data": run.data.model_copy(update=fraction)})


def _check(checked: Checked) -> dict[str, tuple[str, ...]]:
    """Find mistakes before a model is loaded; returns the groups of every client's held-out rows.

    Raises:
        ConfigError, DataError: What is wrong, and how to fix it.
        RunFolderError: The comparison was begun by an older version.
    """
    run = checked.run
    for arm in federated_arms(run).values():  # one that repeats another is a mistake here only
        own_loss(arm.train.loss, build_task(run.task, run.data.labels, run.prefer))
    if with_validation(run) != run:
        raise RunFolderError(
            "this comparison was begun by an older version of silotune, without validation rows.\n"
            "  Finish it with that version, or start a new comparison."
        )
    if run.runtime.name == "flower":
        raise ConfigError(
            "runtime.name = 'flower' cannot be compared: the local and the centralized arms are "
            "trained on this machine, on the clients' rows.\n"
            "  Set runtime.name = 'in-process' or 'flower-simulation'."
        )
    for name in run.compare.only:
        if name not in checked.rows:
            raise ConfigError(
                f"compare.only: there is no client '{name}'.{did_you_mean(name, checked.rows)}\n"
                f"  The clients are: {', '.join(sorted(checked.rows))}."
            )
    if run.compare.group is None:
        return {}
    rows = load_clients(
        run.data,
        run.partition,
        seed=run.seed,
        task=run.task,
        server_fraction=run.server.data_fraction,
        group=run.compare.group,
    )
    return {name: own.groups for name, own in rows.items()}


def _compare(
    folder: ComparisonFolder,
    checked: Checked,
    groups: Mapping[str, tuple[str, ...]],
    progress: Progress,
) -> Comparison:
    """The protocol. A finished part is never trained again."""
    if folder.read_json("comparison.json") is not None:
        return Comparison(folder.path)
    run, arms = checked.run, Arms(folder, checked, groups, progress)
    # 1. The untouched base, which every arm starts from.
    arms.base()
    # 2. Every arm tries the same number of settings. Validation rows choose, with a seed of their
    #    own; a lone client chooses for itself, a federation once for all.
    chosen = choose(arms)
    # 3. Train every arm with what it chose, on equal examples. The best round by validation counts,
    #    and its adapter is scored on the held-out rows: nothing was chosen by them.
    for seed in seeds_of(run):
        plan: Plan = {}
        for arm, point in chosen.federated.items():
            done = arms.federated(arm, point, seed)
            plan = plan or rows_trained(done.metrics, arms.data, run)
        for client, point in chosen.local.items():
            arms.alone(client, point, seed, plan[client])
        if run.compare.centralized:
            arms.centralized(chosen.centralized, seed, pooled(plan))
        # 4. With [finish], each client goes on by itself: from the federation, and from alone.
        for arm, own in chosen.own.items():
            for client, point in own.items():
                go_on(arms, arm, client, point, seed)
    # 5. Differences from training alone, paired row by row, with intervals and verdicts.
    parts = places(folder.path, run, arms.data)
    scores = read_scores(parts)
    num_train = {name: len(own.examples) for name, own in arms.data.items()}
    numbers = compare_arms(scores, num_train=num_train) | _choices(arms, chosen, parts)
    # 6. What each client takes by its validation rows, and what that gives it on the held-out ones.
    if arms.has_validation:
        numbers["best"] = choose_best(scores, read_validation(parts, run), num_train=num_train)
    return _write(arms, parts, numbers, scores)


def _choices(arms: Arms, chosen: Chosen, parts: Places) -> dict[str, Any]:
    """What the arms were trained with, and what finding it has cost."""
    return {
        "tuned": arms.run.compare.tune is not False,
        "chosen": chosen.values(),
        "num_trials": chosen.num_trials,
        "at_edge": chosen.at_edge,
        "tuning_costs": {arm: asdict(cost) for arm, cost in chosen.costs.items()},
        "num_validation": {name: len(own.validation) for name, own in arms.checked.rows.items()},
        "rounds": read_rounds(parts) if arms.picks_round else {},
        "shares": read_shares(parts),
    }


def _write(arms: Arms, parts: Places, numbers: dict[str, Any], scores: Scores) -> Comparison:
    """Write what people and programs read about a comparison."""
    folder, checked, run = arms.folder, arms.checked, arms.run
    result = {
        "name": folder.path.name,
        "seeds": list(seeds_of(run)),
        "base_name": public_name(run.model.name),
        "result": RESULT,
        "arms": read_costs(parts),
        **numbers,
        "notes": [
            *([run.report.note] if run.report.note else []),
            *choice_notes(numbers, run),
            *finish_notes(numbers, run),
            *privacy_notes(run),
            *numbers["notes"],
        ],
        "samples": samples(arms.held, scores, run, arms.task),
        "split": describe_split(checked.rows, arms.loaded.tokenizer, arms.task),
    }
    write_atomically(folder.path / "README.md", comparison_card(result, run).encode())
    write_json(folder.path / "results.json", results(folder.path, run, result))
    folder.write_json("comparison.json", result)
    done = Comparison(folder.path)
    if run.report.page:
        done.report()
    return done


def privacy_notes(run: RunConfig) -> list[str]:
    """Which arms [privacy] protects."""
    if run.privacy.unit != "none" and run.finish.local_steps:
        bare = "no noise protects the own steps: they are for the client that takes them"
        return [*privacy_notes(run.model_copy(update={"finish": FinishConfig()})), bare]
    if run.privacy.unit == "record":
        return ["every arm except the base protects its rows, each with noise for its own rows"]
    if run.privacy.is_at_client:
        return [
            "in every arm except the base, the noise protects entire holders of rows; the "
            "centralized arm has a single holder"
        ]
    if run.privacy.unit == "client":
        return ["the federated arms protect clients; the local and centralized arms have no noise"]
    return []
