"""`hhnet VERB` and `python -m pipelines VERB`, the form in which a Ray job names a verb."""

import os
import sys


def main() -> None:
    """Run the command line. Its imports take a moment, in which an interrupt needs no traceback either."""
    try:
        from pipelines.cli import build_app

        build_app()()
    except KeyboardInterrupt:
        sys.stderr.write("hhnet: interrupted before any work was done\n")
        sys.stderr.flush()
        os._exit(130)  # sys.exit would end in the signal's own code if it came inside an exec(), as of dataclasses


if __name__ == "__main__":
    main()
