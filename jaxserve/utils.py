"""Helpers for notebooks: start a server in its own process, wait until it answers, end it. Standard library only."""

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

TERMINATE_TIMEOUT = 40.0  # seconds between SIGTERM and SIGKILL: more than the server's --shutdown-timeout
POLL_SECONDS = 0.25
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a local server is not behind the proxy


def launch_server(command: str) -> "subprocess.Popen[str]":
    """Runs a shell-like command, as in "python -m jaxserve --port 30000", without a shell; its output goes where ours
    goes.

    `python` means the interpreter that runs this. Line ends may be escaped by a backslash, as in a shell.
    """
    parts = shlex.split(command.replace("\\\n", " "))
    if not parts:
        raise ValueError("the command is empty; give one like 'python -m jaxserve --port 30000'")
    if parts[0] in ("python", "python3"):
        parts[0] = sys.executable
    return subprocess.Popen(parts, text=True, stderr=subprocess.STDOUT)


def launch_server_cmd(
    command: str, host: str | None = None, port: int | None = None
) -> "tuple[subprocess.Popen[str], int]":
    """launch_server with --host and --port added where given; a free port where the command names none.

    -> process, port.
    """
    named = _named_port(shlex.split(command.replace("\\\n", " ")))
    if port is None:
        port = named if named is not None else _free_port()
    if port != named:
        command += f" --port {port}"
    if host is not None:
        command += f" --host {shlex.quote(host)}"
    return launch_server(command), port


def _named_port(parts: list[str]) -> int | None:
    for index, part in enumerate(parts):
        if part == "--port" and index + 1 < len(parts):
            return int(parts[index + 1])
        if part.startswith("--port="):
            return int(part.removeprefix("--port="))
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_server(
    base_url: str,
    timeout: float | None = None,
    process: "subprocess.Popen[str] | None" = None,
    api_key: str = "None",
) -> None:
    """Returns once GET {base_url}/v1/models answers 200, which is when everything is compiled.

    Raises TimeoutError after `timeout` seconds (with the stage the server is at), RuntimeError when `process` ends
    first.
    """
    started = time.monotonic()
    headers = {"Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(base_url.rstrip("/") + "/v1/models", headers=headers)
    state = "nothing listens there yet"
    while True:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server process ended with exit code {process.returncode} before it was ready")
        try:
            with _DIRECT.open(request, timeout=5) as reply:
                if reply.status == 200:
                    return
        except urllib.error.HTTPError as error:
            state = _stage_of(error)
        except OSError as error:  # refused, reset or too slow
            state = str(error)
        if timeout is not None and time.monotonic() - started > timeout:
            raise TimeoutError(f"{base_url} was not ready after {timeout:g} s: {state}")
        time.sleep(POLL_SECONDS)


def _stage_of(error: urllib.error.HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        return f"HTTP {error.code}"


def terminate_process(process: "subprocess.Popen[str]") -> None:
    """Asks the server to stop, waits for it, and kills it if it does not; fine for one that has ended already."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(TERMINATE_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def print_highlight(text: str) -> None:
    """Prints a line so that it stands out from a server's log."""
    print(f"\n>>> {text}\n", flush=True)
