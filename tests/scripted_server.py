"""`python scripted_server.py [flags]`: the real launcher with a ScriptedEngine in the child process, for
test_api_launch."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxserve.config import EngineConfig
from jaxserve.flags import parse_or_exit
from jaxserve.types import EngineFailed


def engine(connection, config: EngineConfig) -> None:
    """Speaks endlessly, 10 ms a token. SCRIPT=fail: cannot start; slow: never gets ready."""
    import signal

    from tests.fakes import ScriptedEngine

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def script(request, index):
        time.sleep(0.01)
        return 40 + index % 20

    mode = os.environ.get("SCRIPT")
    fake = ScriptedEngine(script, announce_ready=mode is None, vocab_size=256)
    fake._end.close()
    fake._end = connection
    if mode == "fail":
        connection.send(EngineFailed("max_model_len 9000 does not fit; lower --max-model-len", exit_code=2))
        os._exit(2)
    Path(os.environ["ENGINE_PID_FILE"]).write_text(str(os.getpid()))
    fake._run()


if __name__ == "__main__":
    from jaxserve.launch import launch

    sys.exit(launch(parse_or_exit(sys.argv[1:]), engine))
