"""The command line: parse, call one public function, print. Heavy imports happen inside."""

import typer

from silotune.cli import after, audit, chat, client, data, plan, privacy, run, server, sweep

app = typer.Typer(
    name="silotune",
    help="Fine-tune one language model across many data holders whose rows never leave them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
run.register(app)
data.register(app)
plan.register(app)
sweep.register(app)
privacy.register(app)
audit.register(app)
after.register(app)
chat.register(app)
server.register(app)
client.register(app)
