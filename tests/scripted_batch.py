"""`python scripted_batch.py [flags]`: `jaxserve batch` with a ScriptedEngine in the child process, for
test_offline_batch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from jaxserve.batch_flags import parse_or_exit
    from jaxserve.offline import answer
    from tests.scripted_server import engine

    sys.exit(answer(parse_or_exit(sys.argv[1:]), engine))
