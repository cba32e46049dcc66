"""The server that a command talks to: the one that was named, the one that runs on the default port, or one of its
own, which lives as long as the command does.
"""

import argparse
import ctypes
import difflib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxserve.config import ServerConfig
from jaxserve.flags import FlagError, parse
from jaxserve.terminal.http import Server, ServerError, base_url
from jaxserve.utils import _free_port, terminate_process

DEFAULT_URL = f"http://127.0.0.1:{ServerConfig().port}"
POLL_SECONDS = 0.2
PROBE_SECONDS = 2.0  # for an answer on the default port
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class CommandError(Exception):
    """What the user can mend; the message says how. Exit code 2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which server is meant, and at the end of --help what happens without them."""
    parser.add_argument(
        "--url", "--base-url", type=base_url, metavar="URL", help="of a running server (default: $JAXSERVE_URL)"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="served name, or what a server is started with (default: the server's)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="default: $JAXSERVE_API_KEY")
    parser.epilog = (
        f"Without --url: the server on {DEFAULT_URL}; where there is none, or flags of the server are given (see "
        f"jaxserve --help), one is started and ends with the command. {parser.epilog or ''}"
    )


def address(url: str | None, api_key: str | None, environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """What was given, or stands in JAXSERVE_URL and JAXSERVE_API_KEY. Raises CommandError."""
    if url is None and (named := environ.get("JAXSERVE_URL")):
        try:
            url = base_url(named)
        except ValueError as error:
            raise CommandError(f"JAXSERVE_URL: {error}") from None
    return url, api_key or environ.get("JAXSERVE_API_KEY") or None


def server_flags(parser: argparse.ArgumentParser, rest: Sequence[str]) -> Sequence[str]:
    """What a command's parser left over, which must be flags of the server. Raises CommandError."""
    if not rest:
        return rest
    try:
        parse(rest)
    except FlagError as error:
        name = rest[0].partition("=")[0]
        close = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        raise CommandError(f"unknown flag {name}; did you mean {close[0]}?" if close else str(error)) from None
    return rest


def served_models(server: Server, timeout: float = 10.0) -> list[dict[str, Any]]:
    """What /v1/models lists. Raises ServerError."""
    listed = server.get("/v1/models", timeout)
    models = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(models, list) or not models:
        raise ServerError(f"{server.url} lists no model: it is no server of OpenAI's kind")
    return models


@contextmanager
def find_or_start(
    url: str | None, model: str | None, api_key: str | None, flags: Sequence[str]
) -> Generator[tuple[Server, str], None, None]:
    """-> a server that is ready, and the name of the model there.

    url: use this one. Without: the one on the default port if it serves the model and no server flags are given, else
    one is started with the model and the flags. Raises CommandError.
    """
    if url is not None:
        if flags:
            raise CommandError(f"{flags[0]} is a flag of a server that is started here; leave it or --url out")
        server = Server(url, api_key)
        yield server, _model_of(_wait_ready(server), model, url)
        return
    found = None if flags else _on_default_port(api_key)
    if found is not None:
        names = [each["id"] for each in served_models(found)]
        if model is None or model in names:
            yield found, model or names[0]
            return
        print(f"{found.url} serves {names[0]}, so {model} is started beside it", file=sys.stderr)
    with _started(model, flags) as started:
        yield started, served_models(started)[0]["id"]


def _model_of(models: list[dict[str, Any]], wanted: str | None, url: str) -> str:
    names = [each["id"] for each in models]
    if wanted is not None and wanted not in names:
        raise CommandError(f"{url} does not serve {wanted}; it serves {', '.join(names)}")
    return wanted or names[0]


def _on_default_port(api_key: str | None) -> Server | None:
    """None where nothing listens there, or something else than a server that this key opens."""
    server = Server(DEFAULT_URL, api_key)
    try:
        served_models(server, PROBE_SECONDS)
        return server
    except ServerError as error:
        if error.status != 503:
            return None
    try:
        _wait_ready(server)
        return server
    except CommandError:
        return None


def _wait_ready(server: Server) -> list[dict[str, Any]]:
    """Waits while the server says that it is starting. Raises CommandError."""
    told = False
    while True:
        try:
            return served_models(server)
        except ServerError as error:
            if error.status in (401, 403):
                raise CommandError(f"{server.url} wants a key: {error} (--api-key or JAXSERVE_API_KEY)") from None
            if error.status != 503:
                raise CommandError(str(error)) from None
            if not told:
                print(f"{server.url} is not ready yet: {error}", file=sys.stderr)
                told = True
        time.sleep(POLL_SECONDS)


@contextmanager
def _started(model: str | None, flags: Sequence[str]) -> Generator[Server, None, None]:
    """A server of our own on a free port, with a key of its own; its progress goes to our standard error."""
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as files:
        ours = ["--port", str(_free_port()), "--log-level", "warning", "--file-storage-path", files]
        arguments = [*ours, *(() if model is None else ("--model", model)), *flags]
        try:
            config = parse(arguments).server  # of two values for a flag the later one counts
        except FlagError as error:
            raise CommandError(str(error)) from None
        key = config.api_key or secrets.token_urlsafe(16)
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", *arguments],
            env=os.environ | {"JAXSERVE_API_KEY": key},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            start_new_session=True,  # Ctrl-C is for this process; it ends the other one itself
            preexec_fn=_end_with_parent,
            text=True,
        )
        scheme = "http" if config.ssl_certfile is None else "https"
        host = {"0.0.0.0": "127.0.0.1"}.get(config.host, config.host)
        server = Server(f"{scheme}://{host}:{config.port}", key)
        try:
            _wait_started(server, process)
            yield server
        finally:
            terminate_process(process)


def _end_with_parent() -> None:
    """In the child, before it runs: when this process is killed, the server is asked to stop. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_started(server: Server, process: "subprocess.Popen[str]") -> None:
    """Raises CommandError when the process ends first; what it says of why is on standard error already."""
    while True:
        if process.poll() is not None:
            raise CommandError("the server could not start: see above")
        try:
            served_models(server)
            return
        except ServerError as error:
            if error.status not in (0, 503):
                raise CommandError(f"the server that was started refuses: {error}") from None
        time.sleep(POLL_SECONDS)
