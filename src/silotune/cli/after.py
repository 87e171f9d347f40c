"""Commands after a run: ask, evaluate, export, report."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from silotune.cli.frame import errors_as_exit_codes, plain, print_json, print_table

RunFolderArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(ask)
    app.command()(evaluate)
    app.command()(export)
    app.command()(report)


def ask(
    run: RunFolderArgument,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    base: Annotated[bool, typer.Option("--base", help="Let the untouched base answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 128,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer a question with the trained adapter, or with the base."""
    with errors_as_exit_codes():
        import silotune

        text = silotune.Run(run).ask(question, base=base, max_new_tokens=max_new_tokens)
        if json:
            print_json({"question": question, "answer": text, "base": base})
        else:
            typer.echo(plain(text))


def evaluate(
    run: RunFolderArgument,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="A suite, several times for several; lm-eval:<task> for a task of lm-eval. "
            "Without one, the run's own held-out questions."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SUITE=FILE", help="Read a suite from a local file, not the hub."),
    ] = None,
    leaderboard: Annotated[
        bool,
        typer.Option("--leaderboard", help="Also by the protocols of FlowerTune's leaderboards."),
    ] = False,
    instructions: Annotated[
        Path | None,
        typer.Option(help="JSON: suite -> the leaderboard's own instruction sentence."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one forward pass.")] = 16,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions a suite, drawn.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Ask the untouched base too.")] = True,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Let programs that the model wrote run here."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print scores.json.")] = False,
) -> None:
    """Put questions with known answers to a run and to its base."""
    with errors_as_exit_codes():
        import silotune
        from silotune.federation.progress import pick_progress
        from silotune.results.run import Run
        from silotune.workflows.evaluate.evaluate import (
            label_table,
            lm_eval_lines,
            quality_table,
            suite_table,
        )

        questions = silotune.Questions(
            suites=tuple(suite or ()),
            data=_files(data or ()),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            limit=limit,
            leaderboard=leaderboard,
            instructions=_instructions(instructions),
            base=base,
            allow_code_execution=allow_code_execution,
        )
        done = silotune.evaluate(run, questions, progress=pick_progress())
        scores = done.scores
        if json:
            print_json(scores)
            return
        if suite:
            print_table(suite_table(scores))
            for line in lm_eval_lines(scores):
                typer.echo(line)
        elif Run(run).config.task == "classify":
            print_table(label_table(scores))
        else:
            print_table(quality_table(scores))
        typer.echo(f"all answers: {done.path}")


def _files(pairs: list[str] | tuple[str, ...]) -> dict[str, Path]:
    from silotune.core.errors import ConfigError

    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise ConfigError(f"--data '{pair}': write SUITE=FILE, as in medqa=questions.jsonl.")
        found[name] = Path(path)
    return found


def _instructions(path: Path | None) -> dict[str, str]:
    import json

    from silotune.core.errors import ConfigError

    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--instructions {path}: cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ConfigError(f'--instructions {path}: write {{"medqa": "Answer with a letter."}}.')
    return found


def export(
    run: RunFolderArgument,
    to: Annotated[
        Path | None, typer.Option(help="Folder to create; by default RUN/export/<kind>.")
    ] = None,
    kind: Annotated[
        Literal["peft", "merged", "gguf"],
        typer.Option(
            "--as",
            help="The adapter for PEFT; a plain model with the adapter merged into it; one file "
            "for llama.cpp (Llama family).",
        ),
    ] = "peft",
    gguf_type: Annotated[
        Literal["f16", "f32", "q8_0"] | None,
        typer.Option("--type", help="How a GGUF file stores matrices; by default f16."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload it to the hub too, for you alone."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: everyone may read it.")
    ] = False,
) -> None:
    """Write a run's result for others to load: PEFT, a merged model, or GGUF; or push it."""
    with errors_as_exit_codes():
        import silotune
        from silotune.federation.progress import pick_progress

        place = silotune.Run(run).export(
            kind, to=to, gguf_type=gguf_type, push=push, public=public, progress=pick_progress()
        )
        typer.echo(place)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run or comparison folder.")],
) -> None:
    """Write report.html: a run or a comparison on one page that needs no network."""
    with errors_as_exit_codes():
        from silotune.results.run import Run
        from silotune.workflows.compare.compare import Comparison, ComparisonFolder

        is_comparison = (run / ComparisonFolder.RECIPE).is_file()
        typer.echo(Comparison(run).report() if is_comparison else Run(run).report())
