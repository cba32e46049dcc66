"""The real HTTP server (uvicorn in a thread) in front of a ScriptedEngine, for tests of the API."""

import asyncio
import json
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

import httpx2
import openai
import uvicorn

from jaxserve.api.app import create_app
from jaxserve.client import EngineClient
from jaxserve.config import ServerConfig
from jaxserve.connection import Connection
from jaxserve.service import bind
from jaxserve.store import Store
from jaxserve.text.tokenizer import Tokenizer
from tests.fakes import Script, ScriptedEngine, say, write_byte_level

MODEL = "test-model"
_folder = tempfile.TemporaryDirectory()
TOKENIZER = Tokenizer.from_folder(write_byte_level(Path(_folder.name)))


class ApiServer:
    """A context manager: base URL, engine, and clients for one server. Texts are what choice 0, 1, … says."""

    def __init__(
        self,
        *texts: str,
        script: Script | None = None,
        engine: dict[str, Any] | None = None,
        store: Store | None = None,
        worker: dict[str, Any] | None = None,
        tokenizer: Tokenizer = TOKENIZER,
        **config: Any,
    ):
        self.store, self.worker_options, self.tokenizer = store, worker or {}, tokenizer
        self.engine = ScriptedEngine(script or say(tokenizer, *(texts or ("hello world",))), **(engine or {}))
        self.config = ServerConfig(**({"served_model_names": (MODEL,), "model_path": "/models/test"} | config))
        self.started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        key = self.config.api_key or "None"
        self.http = httpx2.Client(base_url=self.url, timeout=20, trust_env=False)
        self.openai = openai.OpenAI(
            base_url=self.url + "/v1", api_key=key, max_retries=0, http_client=httpx2.Client(trust_env=False)
        )

    async def _serve(self) -> None:
        self.client = EngineClient(self.engine.client_end)
        self.app = create_app(self.client, self.config, self.tokenizer, self.store)
        self.serving = self.app.state.serving
        worker = self.serving.batch_worker
        for name, value in self.worker_options.items():
            setattr(worker, name, value)
        self.client.start()
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, http=Connection, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        )
        serving = asyncio.ensure_future(self.server.serve(sockets=[self.listener]))
        if self.engine._announce_ready:
            await self.client.wait_ready()
            if worker is not None:
                worker.start()
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.started.set()
        await serving
        if worker is not None:
            await worker.stop()
        await self.client.close(0.5)

    def __enter__(self) -> Self:
        self.engine.start()
        self.thread.start()
        assert self.started.wait(20)
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self.thread.join(10)
        self.engine.__exit__()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        if isinstance(body, bytes):
            return self.http.post(path, content=body, **options)
        return self.http.post(path, json=body, **options)

    def chat(self, **fields: Any) -> httpx2.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
        return self.post("/v1/chat/completions", body | fields)

    def complete(self, **fields: Any) -> httpx2.Response:
        return self.post("/v1/completions", {"model": MODEL, "prompt": "hello", "max_tokens": 64} | fields)


def events(reply: httpx2.Response) -> list[Any]:
    """The payloads of a finished stream; asserts its framing, with [DONE] at its end and nowhere else."""
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    parts = reply.text.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]", parts[-3:]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def error_of(reply: httpx2.Response, status: int) -> dict[str, Any]:
    """The error object of a reply, whose shape is checked against OpenAI's."""
    assert reply.status_code == status, (reply.status_code, reply.text[:500])
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error
