"""One replica: a server process of its own on a free port of this machine, and the way to it.

The server is a child and not a part of Ray's process: it keeps its exit codes, its signals and its own environment, and
Ray's event loop waits for no tokenizer. The two end together: the server reads a pipe that closes with this process
(child.py), and a thread here waits for the server.
"""

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
from ray import serve

from deploy.ray.args import FleetArgs
from deploy.ray.calls import REPLICA_HEADER, Call, Head, passed_on

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.25
STOP_SECONDS = 15.0  # Ray has waited for the open requests before it ends a replica


class Server:
    """The child process. Ends the whole replica when it ends by itself, so that Ray puts another in its place."""

    def __init__(self, args: FleetArgs) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.stopping = False
        end, self._alive = os.pipe()  # nobody writes; the kernel closes our end with this process
        # Without --store, nothing that one replica keeps may be asked of another: the ingress refuses it.
        self._files = tempfile.TemporaryDirectory(prefix="jaxserve-")
        command = [
            args.python or _python(),
            "-P",
            str(Path(__file__).with_name("child.py")),
            str(end),
            *self._flags(args),
        ]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(command, env=environment, pass_fds=[end], stdin=subprocess.DEVNULL)
        os.close(end)

    def _flags(self, args: FleetArgs) -> list[str]:
        flags = ["--host", "127.0.0.1", "--port", str(self.port), *shlex.split(args.flags)]
        if args.flag("--log-level-http") is None:
            flags += ["--log-level-http", "warning"]  # the ingress logs requests, and polls of the queue are nobody's
        if args.model is not None:
            flags += ["--model", args.model]
        if not shared_store(args):
            flags += ["--file-storage-path", self._files.name]
        return flags

    def end_together(self) -> None:
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        code = self.process.wait()
        if not self.stopping:
            print(f"the server ended with exit code {code}; so does this replica", flush=True)
            os._exit(1)

    def stop(self) -> None:
        self.stopping = True
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._files.cleanup()


class Replica:
    """Deployed by fleet.build; its methods are called through Ray."""

    async def __init__(self, args: FleetArgs) -> None:
        """Returns when the server can serve. Raises RuntimeError when it ends before."""
        self.name = serve.get_replica_context().replica_id.unique_id
        key = args.flag("--api-key") or os.environ.get("JAXSERVE_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.server = Server(args)
        self.session = aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        await self._wait_ready()
        self.server.end_together()

    async def _wait_ready(self) -> None:
        while not await self._is_ready():
            code = self.server.process.poll()
            if code is not None:
                raise RuntimeError(f"the server ended with exit code {code} before it was ready; its lines are above")
            await asyncio.sleep(POLL_SECONDS)

    async def _is_ready(self) -> bool:
        try:
            async with self.session.get(self.server.url + "/health") as reply:
                return reply.status == 200
        except aiohttp.ClientError:
            return False

    async def check_health(self) -> None:
        """Ray's health check. Raises RuntimeError when the server cannot serve."""
        if not await self._is_ready():
            raise RuntimeError("the server's /health does not answer 200")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray's custom metrics: the engine's queue. Raises aiohttp.ClientError."""
        if self.server.stopping:
            return {"running": 0.0, "waiting": 0.0, "rows": 0.0}
        async with self.session.get(self.server.url + "/v1/loads", headers=self.headers) as reply:
            reply.raise_for_status()
            loads: list[dict[str, Any]] = (await reply.json())["loads"]
        names = {"running": "num_running_reqs", "waiting": "num_waiting_reqs", "rows": "max_running_requests"}
        return {ours: float(sum(load[theirs] for load in loads)) for ours, theirs in names.items()}

    async def forward(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """A Head, then the bytes of the reply as they come. Closed early, it closes the connection to the server."""
        async with self._request(call) as reply:
            yield self._head(reply)
            async for chunk in reply.content.iter_any():
                yield chunk

    async def ask(self, call: Call) -> tuple[Head, bytes]:
        """A whole reply, for calls that go to every replica."""
        async with self._request(call) as reply:
            return self._head(reply), await reply.read()

    def _request(self, call: Call) -> Any:
        return self.session.request(
            call.method, self.server.url + call.target, headers=call.headers, data=call.body or None
        )

    def _head(self, reply: aiohttp.ClientResponse) -> Head:
        headers = passed_on(list(reply.headers.items()), frozenset({"content-length"}))
        return Head(reply.status, (*headers, (REPLICA_HEADER, self.name)))

    def __del__(self) -> None:
        """Called by Ray when it takes the replica away."""
        if hasattr(self, "server"):
            self.server.stop()


def shared_store(args: FleetArgs) -> bool:
    return bool(args.flag("--store") or os.environ.get("JAXSERVE_STORE"))


def _python() -> str:
    """Ray's own interpreter where a server could run in it, else that of `make setup` in the checkout."""
    beside = ROOT / ".venv" / "bin" / "python"
    return str(beside) if find_spec("jax") is None and beside.exists() else sys.executable


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
