"""Commands after a run: ask, evaluate, contribution, export, report."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json
from silotune.cli.options import MaxNewTokens, OfClient, RunFolder
from silotune.core.safe_text import plain

Suites = Annotated[
    list[str] | None,
    typer.Option(
        help="A suite, or lm-eval:<task>; repeat this for several. By default, the run's own "
        "held-out questions."
    ),
]
SuiteFiles = Annotated[
    list[str] | None,
    typer.Option(metavar="SUITE=FILE", help="Read a suite from a local file, not from the hub."),
]
Leaderboard = Annotated[
    bool, typer.Option("--leaderboard", help="Also use the protocols of FlowerTune's leaderboards.")
]
Instructions = Annotated[
    Path | None,
    typer.Option(help="JSON file that maps suites to the leaderboard's own instruction sentences."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts in one forward pass.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Maximum number of questions per suite, drawn at random.")
]
AskBase = Annotated[bool, typer.Option(help="Also ask the untouched base.")]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution", help="Run programs that the model wrote, on this machine."
    ),
]


def ask(
    run: RunFolder,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    base: Annotated[bool, typer.Option("--base", help="Ask the untouched base.")] = False,
    client: OfClient = None,
    max_new_tokens: MaxNewTokens = 128,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask the trained model, or its base, a question."""
    with errors_as_exit_codes():
        import silotune

        text = silotune.Run(run).ask(
            question, base=base, client=client, max_new_tokens=max_new_tokens
        )
        if json:
            print_json({"question": question, "answer": text, "base": base})
        else:
            typer.echo(plain(text))


def evaluate(
    run: RunFolder,
    suite: Suites = None,
    data: SuiteFiles = None,
    leaderboard: Leaderboard = False,
    instructions: Instructions = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 16,
    limit: Limit = None,
    base: AskBase = True,
    allow_code_execution: AllowCode = False,
    client: OfClient = None,
    json: Annotated[bool, typer.Option("--json", help="Print scores.json.")] = False,
) -> None:
    """Ask a run and its base questions with known answers."""
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.federation.progress import shown

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
            client=client,
        )
        with shown() as progress:
            done = silotune.evaluate(run, questions, progress=progress)
        if json:
            print_json(done.scores)
        else:
            results.print_scores(done, silotune.Run(run).config.task)


def contribution(
    run: RunFolder,
    json: Annotated[bool, typer.Option("--json", help="Print contribution.json.")] = False,
) -> None:
    """Estimate what each client gave the others.

    By its updates, for the held-out loss of the others. The run needs checkpoint.keep_updates =
    true. Nothing is trained.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.federation.progress import pick_progress

        done = silotune.contribution(run, progress=pick_progress())
        if json:
            print_json(done.result)
        else:
            results.print_contribution(done)


def _files(pairs: list[str] | tuple[str, ...]) -> dict[str, Path]:
    from silotune.core.errors import ConfigError

    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"--data '{pair}': names no suite or no file.\n"
                "  Give it as SUITE=FILE, for example medqa=questions.jsonl."
            )
        found[name] = Path(path)
    return found


def _instructions(path: Path | None) -> dict[str, str]:
    import json

    from silotune.core.errors import ConfigError

    if path is None:
        return {}
    example = '\n  Write suites with their sentences: {"medqa": "Answer with a letter."}'
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--instructions {path}: cannot be read as JSON ({error}).{example}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ConfigError(f"--instructions {path}: is not an object of strings.{example}")
    return found


def export(
    run: RunFolder,
    to: Annotated[
        Path | None, typer.Option(help="Folder to create; by default RUN/export/<kind>.")
    ] = None,
    kind: Annotated[
        Literal["peft", "merged", "gguf"],
        typer.Option(
            "--as",
            help="peft: the adapter, for PEFT. merged: a plain model with the adapter merged into "
            "it. gguf: one file for llama.cpp (Llama family).",
        ),
    ] = "peft",
    gguf_type: Annotated[
        Literal["f16", "f32", "q8_0"] | None,
        typer.Option("--type", help="How a GGUF file stores matrices; by default f16."),
    ] = None,
    with_base: Annotated[
        bool,
        typer.Option("--with-base", help="With peft: also write the base, into the folder base."),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload it to a private repository."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: make the repository public.")
    ] = False,
    client: OfClient = None,
) -> None:
    """Export a run's model: PEFT, merged, or GGUF.

    --push uploads it to the hub as well.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.federation.progress import pick_progress

        place = silotune.Run(run).export(
            kind,
            to=to,
            gguf_type=gguf_type,
            with_base=with_base,
            push=push,
            public=public,
            client=client,
            progress=pick_progress(),
        )
        typer.echo(place)


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, comparison or sweep.")
    ],
    charts: Annotated[
        Literal["svg", "pdf"] | None,
        typer.Option(help="Also write every chart as a file, into the folder's charts/."),
    ] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Also write the tables as CSV, unrounded, into tables/.")
    ] = False,
    latex: Annotated[
        bool, typer.Option("--latex", help="Also write the tables for LaTeX, into tables/.")
    ] = False,
) -> None:
    """Write report.html: a run, comparison or sweep on one page.

    The page needs no network. With --charts, --csv and --latex, its charts and tables are written
    for papers and spreadsheets, too.
    """
    with errors_as_exit_codes():
        from silotune.cli.finished import open_finished
        from silotune.core.errors import ConfigError

        if csv and latex:
            raise ConfigError("--csv and --latex exclude each other.\n  Call the command twice.")
        tables = "csv" if csv else "latex" if latex else None
        page = open_finished(run).report(charts=charts, tables=tables)
        typer.echo(page)
        endings = {"charts": charts, "tables": tables and tables.replace("latex", "tex")}
        for folder, ending in endings.items():
            for file in sorted((run / folder).glob(f"*.{ending}")) if ending else ():
                typer.echo(file)
