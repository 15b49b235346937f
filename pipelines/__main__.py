"""`hhnet VERB` and `python -m pipelines VERB`, the form in which a Ray job names a verb."""

import os
import sys


def run_command_line() -> None:
    """Run the command line; an interrupt while it is still being imported ends it without a traceback."""
    _fill_closed()
    try:
        from pipelines.cli.main import build_app

        build_app()()
    except OSError as error:
        if len(sys.argv) > 1 and {"-h", "--help", "--version"}.isdisjoint(sys.argv):
            raise
        sys.stderr.write(f"hhnet: the help cannot be written to stdout: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(1)  # what stdout still holds would fail once more at the end of the process
    except (KeyboardInterrupt, RuntimeError) as error:
        # Python 3.11 wraps what a class raises while its members are named, as those of the flags are.
        if not isinstance(error.__cause__ or error, KeyboardInterrupt):
            raise
        sys.stderr.write("hhnet: interrupted before any work was done\n")
        sys.stderr.flush()
        os._exit(130)  # sys.exit would end in the signal's own code if it came inside an exec(), as of dataclasses


def _fill_closed() -> None:
    """Open closed ones of stdin, stdout and stderr on /dev/null; else a data file could get number 1 and all output."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (a descriptor, for the whole process)


if __name__ == "__main__":
    run_command_line()
