"""Entry point: run a command, turn errors into one line and exit code 2."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

_INTERRUPTED = "interrupted; a finished `apply` block is kept: run the same command again to go on"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns (and exits with) 0 done, 1 a study that does not hold, 2 bad input, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    code = _run(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        sys.exit(code)
    return code


def _run(arguments: list[str]) -> int:
    import typer

    from layerwright.cli.app import app
    from layerwright.cli.interrupt import remembered_interrupts

    # Not named in typer's public interface, and not click's own in every version of it.
    usage_errors: tuple[type[Exception], ...] = tuple(
        kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
    )
    with remembered_interrupts() as interrupts:
        try:
            outcome = app(arguments, prog_name="layerwright", standalone_mode=False)
            code = outcome if isinstance(outcome, int) else 0
        except (typer.Exit, SystemExit) as leave:
            code = int(getattr(leave, "exit_code", getattr(leave, "code", 0)) or 0)
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except Exception as error:
            # Whatever Ctrl-C was turned into on its way through native code, it is an interruption.
            code = 130 if interrupts.seen else _report(error, usage_errors)
    if code == 130:
        _complain(_INTERRUPTED)
    return code


def _report(error: Exception, usage_errors: tuple[type[Exception], ...]) -> int:
    from layerwright.core.errors import CheckError, PlanError

    if isinstance(error, (CheckError, PlanError)):
        for problem in error.problems:
            _complain(problem)
    elif isinstance(error, usage_errors):
        _complain(_usage(error))
    elif isinstance(error, (ValueError, TypeError, OSError, ImportError)) and not os.environ.get(
        "LAYERWRIGHT_TRACEBACK"
    ):
        _complain(str(error) or type(error).__name__)
    else:
        raise error
    return 2


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", None) or "layerwright"
    return f"{getattr(error, 'format_message', error.__str__)().rstrip('.')}; see `{command} --help`"


def _complain(message: str) -> None:
    print(f"layerwright: {' '.join(message.split())}", file=sys.stderr)
