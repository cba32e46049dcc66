"""Requests of every kind that /openapi.json allows, and of kinds it does not, against the API before a scripted engine:
python -m tools.fuzz SCHEMATHESIS [SECONDS]. Fails on an answer 5xx and on one that the document does not name."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxserve.store.sqlite import SQLiteStore
from tests.api_server import MODEL, ApiServer

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
ROUND = 150  # examples of an operation in one round


def main(schemathesis: str, seconds: float) -> int:
    """Rounds with ever other seeds until the time is over; the exit code of the first that fails."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = SQLiteStore(Path(folder) / "store")
        store.recover()
        with ApiServer(
            "hello world",
            store=store,
            engine={"max_model_len": 2048},
            served_model_names=(MODEL,),
            allow_any_model=True,
            profile_dir=str(Path(folder) / "profiles"),
        ) as server:
            seed = 0
            while time.monotonic() - started < seconds:
                seed += 1
                command = [schemathesis, "run", server.url + "/openapi.json", "--checks", CHECKS]
                command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(ROUND), "--seed", str(seed)]
                command += ["--exclude-path", "/v1/engine"]  # its stream ends with its reader
                command += ["--request-timeout", "20", "--continue-on-failure", "--no-color"]
                print(f"round {seed}", flush=True)
                if code := subprocess.run(command, check=False, cwd=folder).returncode:
                    return code
                if server.client.num_open or server.engine.num_running:
                    time.sleep(1)
                    assert not server.client.num_open, "a request was left running"
        store.close()
    print(f"{seed} rounds in {time.monotonic() - started:.0f} s: no 5xx, no undocumented status")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 600))
