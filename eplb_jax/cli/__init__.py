"""The command line, `eplb-jax`: one module for every command. Needs the extra `cli`."""

import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import jax

try:
    import rich as rich
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as error:
    sys.exit(f"eplb-jax: {error.name} is missing; install it with: pip install 'eplb-jax[cli]'")

from eplb_jax.cli.advise import advise
from eplb_jax.cli.balance import balance
from eplb_jax.cli.convert import convert
from eplb_jax.cli.decide import decide
from eplb_jax.cli.generate import generate
from eplb_jax.cli.moves import moves
from eplb_jax.cli.plan import plan
from eplb_jax.cli.report import report
from eplb_jax.cli.simulate import simulate


class _Commands(TyperGroup):
    """Commands that report an invalid argument or file in one line, and exit with 2."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OverflowError, MemoryError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"eplb-jax: error: {error}", err=True)
            raise typer.Exit(2) from None


main = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@main.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Balance the experts of mixture-of-experts models over GPUs."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        # The first run of a shape compiles for seconds. Machines that share a home differ in CPU.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "eplb-jax" / platform.node()))


for _command in (plan, moves, decide, advise, balance, convert, simulate, report, generate):
    main.command()(_command)
