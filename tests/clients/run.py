"""Serves the default model and runs every client here against it: `python tests/clients/run.py PYTHON NODE_FOLDER`.

PYTHON: an interpreter with requirements.txt; NODE_FOLDER: a copy of node/ with its packages installed ("" skips it).
"""

import os
import subprocess
import sys
from pathlib import Path

from jaxserve.utils import launch_server_cmd, terminate_process, wait_for_server

HERE = Path(__file__).resolve().parent
MODEL = "SmolLM2-135M-Instruct"


def main(python: str, node_folder: str) -> int:
    process, port = launch_server_cmd(f"python -m jaxserve --served-model-name {MODEL} --log-level warning")
    failed = []
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_server(url, 300, process)
        environment = os.environ | {"BASE_URL": f"{url}/v1", "MODEL": MODEL, "OPENAI_API_KEY": "none"}
        clients = [
            [python, str(HERE / name)] for name in ("agents_sdk.py", "pydantic_agents.py", "langchain_clients.py")
        ]
        if node_folder:
            clients += [["node", str(Path(node_folder) / name)] for name in ("openai.mjs", "ai.mjs")]
        for command in clients:
            if subprocess.run(command, env=environment, timeout=300).returncode:
                failed.append(Path(command[1]).name)
    finally:
        terminate_process(process)
    print("every client is at home" if not failed else f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
