"""`python -m jaxserve [flags]` and the console script `jaxserve`: serve a model; `jaxserve batch -i IN -o OUT [flags]`:
answer a file of requests.

Imports nothing heavy before the flags are read.
"""

import sys

from jaxserve.flags import parse_or_exit


def main() -> None:
    """Serves until a signal or the engine's end; exit code 0 ok, 2 what the user can mend, 1 a bug."""
    if sys.argv[1:2] == ["batch"]:
        from jaxserve import offline

        sys.exit(offline.main(sys.argv[2:]))
    options = parse_or_exit(sys.argv[1:])
    from jaxserve.launch import launch

    sys.exit(launch(options))


if __name__ == "__main__":
    main()
