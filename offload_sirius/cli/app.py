"""All commands under one name, and how each ends: 0 done, 1 in part, 2 wrong use or input, 130 interrupted, 143 terminated."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from offload_sirius import __version__
from offload_sirius.cli import batch, bench, chat, doctor, generate, models, pack, plan, serve
from offload_sirius.cli.termination import Termination
from offload_sirius.errors import USER_ERRORS

# Some versions of typer carry a click of their own, others use the installed one: this is the base of the errors of either.
ClickError: Any = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")

EXIT_DONE, EXIT_WRONG_USE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 2, 130, 143

app = typer.Typer(
    name="offload-sirius",
    help="Run language models larger than your GPU's memory: weights are streamed, the output is exactly the full model's.",
    epilog=generate.EXAMPLES,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=chat.EXAMPLES)(chat.chat)
app.command(epilog=serve.EXAMPLES)(serve.serve)
app.command(epilog=batch.EXAMPLES)(batch.batch)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=pack.EXAMPLES)(pack.pack)
app.add_typer(bench.app, name="bench")
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
app.command(epilog=models.EXAMPLES)(models.models)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"offload-sirius {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code; whatever a user or a file can cause is one line on stderr."""
    with Termination() as termination:
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
    return EXIT_TERMINATED if code == EXIT_INTERRUPTED and termination.asked else code


def _run(arguments: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes characters that not every terminal's encoding has
    try:
        code = app(arguments or ["--help"], prog_name="offload-sirius", standalone_mode=False)
        sys.stdout.flush()
        return int(code or EXIT_DONE)
    except ClickError as error:
        return _fail(error.format_message(), arguments)
    except USER_ERRORS as error:
        return _fail(str(error), arguments)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except SystemExit:
        # What typer makes of a broken pipe in the middle of a command, once it has silenced both streams.
        return EXIT_DONE
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _fail(message: str, arguments: Sequence[str]) -> int:
    if "--verbose" in arguments:
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return EXIT_WRONG_USE
