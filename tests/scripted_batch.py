"""`python scripted_batch.py [flags]`: `jaxserve batch` with a ScriptedEngine in the child process, for
test_offline_batch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from jaxserve.offline import main
    from tests.scripted_server import engine

    sys.exit(main(sys.argv[1:], engine))
