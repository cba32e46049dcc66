"""What the front end runs while there is an engine: the HTTP server with its store of files and batches."""

import asyncio
import logging
import resource
import socket
import ssl
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import uvicorn

from jaxserve.api.app import create_app
from jaxserve.api.serving import Serving
from jaxserve.client import EngineClient
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.connection import Connection
from jaxserve.store import Store, StoreError
from jaxserve.store.sqlite import SQLiteStore

log = logging.getLogger(__name__)
BACKLOG = 2048
# Seconds that an idle connection stays. Longer than the 60 after which load balancers close theirs: one that sends a
# request just when it is closed from here answers 502.
KEEP_ALIVE = 75
DRAIN_POLL = 0.05  # seconds


class Service(Protocol):
    """What an engine is brought up for: the HTTP server, or one job."""

    def attach(self, client: EngineClient) -> Serving:
        """Before anything starts."""
        ...

    async def run(self) -> int:
        """From the start of the engine on; returns the exit code when the service ends by itself."""
        ...

    def on_ready(self, seconds: float) -> None:
        """The engine can serve, that long after its start."""
        ...

    async def stop(self, grace: float) -> None:
        """Takes nothing new, and gives what is open `grace` seconds; run() has returned then."""
        ...

    def hurry(self) -> None:
        """A second signal: drops what is open."""
        ...


class HttpService:
    """The API over HTTP, and the batches."""

    def __init__(self, config: ServerConfig, listener: socket.socket, store: Store | None, store_missing: str) -> None:
        self.config, self.listener, self.store, self.store_missing = config, listener, store, store_missing
        self.ended = asyncio.Event()
        self.hurried = asyncio.Event()

    def attach(self, client: EngineClient) -> Serving:
        app = create_app(client, self.config, store=self.store)
        self.client, self.serving = client, app.state.serving
        self.serving.store_missing = self.store_missing
        self.server = _Server(
            uvicorn.Config(
                app,
                http=Connection,
                timeout_keep_alive=KEEP_ALIVE,
                log_config=None,
                lifespan="off",
                server_header=False,
                **tls_options(self.config),
            )
        )
        return self.serving

    async def run(self) -> int:
        log.info(
            "starting %s on %s; requests get 503 until it is ready", self.config.served_model_names[0], self._url()
        )
        try:
            await self.server.serve(sockets=[self.listener])
        finally:
            self.ended.set()
        if not self.serving.stopping:
            log.error("the HTTP server ended by itself")
        return 1

    def on_ready(self, seconds: float) -> None:
        if self.serving.batch_worker is not None:
            self.serving.batch_worker.start()
        log.info("The server is fired up and ready to roll! %s/v1 (%.1f s)", self._url(), seconds)

    def _url(self) -> str:
        config = self.config
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
        scheme = "http" if config.ssl_certfile is None else "https"
        return f"{scheme}://[{host}]:{config.port}" if ":" in host else f"{scheme}://{host}:{config.port}"

    async def stop(self, grace: float) -> None:
        """While open requests finish the port stays open: new ones are told 503, not refused a connection."""
        deadline = time.monotonic() + grace
        if self.serving.batch_worker is not None:
            await self.serving.batch_worker.stop()
        if self.client.num_open:
            log.info("waiting for %d open requests", self.client.num_open)
        while self.client.num_open and not self.hurried.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL)
        self.server.config.timeout_graceful_shutdown = max(1, round(deadline - time.monotonic()))
        self.server.should_exit = True
        await self.ended.wait()

    def hurry(self) -> None:
        self.hurried.set()
        self.server.force_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: FrontEnd decides what a signal means."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def tls_options(config: ServerConfig) -> dict[str, Any]:
    """What uvicorn is told of certificates. Raises ConfigError for files that are missing or do not fit each other."""
    if config.ssl_certfile is None:
        others = ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs", "ssl_cert_reqs")
        if given := [name for name in others if getattr(config, name)]:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --ssl-certfile")
        return {}
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A function, since OpenSSL would ask at the terminal for a password that is missing.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, lambda: config.ssl_keyfile_password or "")
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = [name for name in (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs) if name]
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"TLS with {', '.join(files)} is not possible: {reason}") from None
    if config.ssl_cert_reqs and config.ssl_ca_certs is None:
        raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs, which says who signs the clients' certificates")
    return {
        "ssl_certfile": config.ssl_certfile,
        "ssl_keyfile": config.ssl_keyfile,
        "ssl_keyfile_password": config.ssl_keyfile_password,
        "ssl_ca_certs": config.ssl_ca_certs,
        "ssl_cert_reqs": config.ssl_cert_reqs,
    }


def raise_file_limit() -> None:
    """As many open connections as the system lets this process have; often only 1024 are allowed at first."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says unlimited and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything heavy. Raises OSError when the address is taken or unknown."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones inherit it: 40 ms a reply
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def open_store(config: ServerConfig, default: str) -> tuple[Store | None, str]:
    """-> the store of files and batches, recovered; or None and why, where the user did not ask for it.

    Raises StoreError when --file-storage-path names a folder, or --store a database, that cannot be used.
    """
    if config.store is not None:
        return shared_store(config), ""
    try:
        return recovered_store(config.file_storage_path or default), ""
    except StoreError as error:
        if config.file_storage_path is not None:
            raise
        log.warning("files and batches are not available: %s", error)
        return None, str(error)


def shared_store(config: ServerConfig) -> Store:
    """The store of --store, recovered. Raises StoreError, StoreFull."""
    url = config.store or ""
    if not url.startswith(("postgresql://", "postgres://")):
        raise StoreError(f"--store is {url.split(':')[0]}:…; it takes postgresql://USER@HOST/DATABASE")
    if config.file_storage_path is not None:
        raise StoreError("--store keeps files and batches in its database; leave --file-storage-path out")
    try:
        from jaxserve.store.postgres import PostgresStore
    except ImportError as error:
        raise StoreError(f"--store needs psycopg ({error}): pip install 'jaxserve[postgres]'") from None
    return _recovered(PostgresStore(url))


def recovered_store(path: str) -> Store:
    """Raises StoreLocked, StoreFull, StoreError."""
    return _recovered(SQLiteStore(path))


def _recovered(store: Store) -> Store:
    try:
        store.recover()
    except BaseException:
        store.close()
        raise
    return store
