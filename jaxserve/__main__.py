"""`python -m jaxserve [flags]` and the console script `jaxserve`: serve a model.

Imports nothing heavy before the flags are read.
"""

import sys

from jaxserve.flags import parse_or_exit


def main() -> None:
    """Serves until a signal or the engine's end; exit code 0 ok, 2 what the user can mend, 1 a bug."""
    options = parse_or_exit(sys.argv[1:])
    from jaxserve.launch import launch

    sys.exit(launch(options))


if __name__ == "__main__":
    main()
