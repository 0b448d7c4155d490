"""The command line: `eplb-jax plan`, `simulate` and `generate`. Needs the extra `cli`."""

import sys

try:
    import rich as rich
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"eplb-jax: {error.name} is missing; install it with: pip install 'eplb-jax[cli]'")

from eplb_jax.cli.generate import generate
from eplb_jax.cli.plan import plan
from eplb_jax.cli.simulate import simulate

main = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@main.callback()
def _commands() -> None:
    """Balance the experts of mixture-of-experts models over GPUs."""


for _command in (plan, simulate, generate):
    main.command()(_command)
