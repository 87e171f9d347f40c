"""The command algorithms: what each algorithm promises and needs."""

from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_line


def algorithms(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show one algorithm and its paper.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all facts as JSON.")] = False,
) -> None:
    """List the algorithms: what each sends, promises and needs.

    "exact" says whether the product of the new LoRA factors is the mean of the clients' products.
    """
    with errors_as_exit_codes():
        import dataclasses

        from silotune.algorithms import ALGORITHMS
        from silotune.cli.tables import print_table
        from silotune.core.errors import ConfigError
        from silotune.core.wording import did_you_mean

        facts = {key: config.facts for key, (config, _) in ALGORITHMS.items()}
        if name is not None and name not in facts:
            raise ConfigError(
                f"there is no algorithm '{name}'.{did_you_mean(name, facts)}\n"
                "  silotune algorithms lists them."
            )
        chosen = facts if name is None else {name: facts[name]}
        if json:
            print_json({key: dataclasses.asdict(fact) for key, fact in chosen.items()})
            return
        head = (
            "algorithm",
            "clients send",
            "receive",
            "exact",
            "sums suffice",
            "client noise",
            "mixed ranks",
        )
        rows = [
            (
                key,
                fact.up,
                fact.down,
                fact.exact,
                "yes" if fact.by_sums else "no",
                "yes" if fact.linear and not fact.remembers else "no",
                "yes" if fact.mixed_ranks else "no",
            )
            for key, fact in chosen.items()
        ]
        print_table([head, *rows])
        if name is not None:
            config, _ = ALGORITHMS[name]
            settings = ", ".join(f"algorithm.{key}" for key in config.model_fields)
            print_line()
            print_line(f"{facts[name].paper}. {facts[name].differs}")
            print_line(f"Settings: {settings} (docs/recipe.md).")
