"""The list of commands, and what becomes of an error: one message and an exit code.

0 fine, 2 configuration, 3 data, 4 non-finite, 5 out of memory, 130 and 143 signals, 1 a fault of ours.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
import traceback

import typer

import deltaw.cli.commands as commands
from deltaw.errors import DeltawError

app = typer.Typer(
    name="deltaw",
    help="Train, compare, keep, merge and use low-rank changes of pretrained models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEBUG = "--debug"


def _version(wanted: bool) -> None:
    if wanted:
        from deltaw import __version__

        typer.echo(f"deltaw {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, DEBUG, help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", is_eager=True, callback=_version
    ),
) -> None:
    """Options of every command; `run` acts on --debug."""


for _module in sorted(m.name for m in pkgutil.iter_modules(commands.__path__)):
    importlib.import_module(f"deltaw.cli.commands.{_module}").add(app)


def run() -> None:
    """Run the command of sys.argv and end the process."""
    debug = DEBUG in sys.argv
    if debug:  # accepted anywhere on the line
        sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != DEBUG)]
    code = 0
    try:
        returned = app(standalone_mode=False)  # what a command gives to typer.Exit comes back as a number
        code = returned if isinstance(returned, int) else 0
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _end_at_the_next_signal()
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except DeltawError as error:
        code = _told(error, debug, error.exit_code)
    except BrokenPipeError:
        code = 0
    except Exception as error:
        code = _other(error, debug)
    if sys.stdout is not None:  # closed by the caller
        sys.stdout.flush()
    _end_at_the_next_signal()
    sys.exit(code)


def _end_at_the_next_signal() -> None:
    """What is kept has been written: a signal from here on, or a second one, needs no traceback out of some exit hook."""
    for known in (signal.SIGINT, signal.SIGTERM):
        signal.signal(known, lambda number, _: os._exit(128 + number))


def _told(error: BaseException, debug: bool, code: int) -> int:
    if debug:
        traceback.print_exception(error)
    else:
        print(f"error: {error}", file=sys.stderr)
    return code


def _other(error: Exception, debug: bool) -> int:
    """Errors that are not ours: usage errors of typer, signals of a run, full disks, and the unexpected."""
    usage = getattr(error, "format_message", None)
    if usage is not None:
        text = usage()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text)
            return 2
        if type(error).__name__ == "NoSuchOption":
            text += "; settings of a run are written key=value, without dashes"
        return _told(UsageText(text), debug, 2)
    code = getattr(error, "code", None)
    if type(error).__name__ == "Interrupted" and isinstance(code, int):
        _end_at_the_next_signal()
        print(f"stopped by {error}", file=sys.stderr)
        return code
    if isinstance(error, OSError):
        return _told(error, debug, 2)
    if debug:
        traceback.print_exception(error)
    else:
        print(
            f"error: unexpected {type(error).__name__}: {error}\n(run again with {DEBUG} for the traceback)",
            file=sys.stderr,
        )
    return 1


class UsageText(Exception):
    """A usage error's text, from whichever click the command line library brings."""
