"""What stands before the routes: keys, origins, TLS, and the way a server ends."""

import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

import jaxserve.api.http
from jaxserve.config import ConfigError, ServerConfig
from jaxserve.connection import Connection
from jaxserve.flags import FlagError, parse
from jaxserve.service import tls_options
from tests.api_server import MODEL, ApiServer, error_of
from tests.test_api_launch import Launched, eventually
from tests.test_api_life import slowly

PAGE = {"Origin": "https://page.example"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_admin_key_alone_opens_the_admin_routes():
    with ApiServer("x", api_key="user", admin_api_key="admin") as server:
        flush = [server.post("/flush_cache", headers=headers) for headers in ({}, bearer("user"), bearer("admin"))]
        assert [reply.status_code for reply in flush] == [401, 401, 200]
        assert error_of(flush[1], 401)["code"] == "invalid_api_key" and "--admin-api-key" in flush[1].text
        for path in ("/abort_request", "/start_profile", "/stop_profile"):
            assert error_of(server.post(path, {}, headers=bearer("user")), 401)
        assert server.http.get("/v1/models", headers=bearer("user")).status_code == 200
        assert server.http.get("/v1/models", headers=bearer("admin")).status_code == 401
        shown = server.http.get("/server_info", headers=bearer("user")).json()["server"]
        assert not {"api_key", "admin_api_key", "ssl_keyfile_password"} & set(shown)
    with ApiServer("x", admin_api_key="admin") as server:  # everything else is open
        assert server.http.get("/v1/models").status_code == 200
        assert server.post("/flush_cache").status_code == 401
    with ApiServer("x", api_key="user") as server:
        assert server.post("/flush_cache", headers=bearer("user")).status_code == 200


def test_the_key_may_come_in_anthropics_header_and_probes_need_none():
    with ApiServer("x", api_key="k") as server:
        assert server.http.get("/v1/models", headers={"x-api-key": "k"}).status_code == 200
        for headers in ({"x-api-key": "K"}, {"x-api-key": ""}, {"Authorization": "k"}, {"Authorization": "Basic k"}):
            error = error_of(server.http.get("/v1/models", headers=headers), 401)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        for path in ("/health", "/ping", "/metrics"):
            assert server.http.get(path).status_code == 200
        assert server.http.get("/openapi.json").status_code == 401


def preflight(server: ApiServer, **headers: str):
    asked = PAGE | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    return server.http.options("/v1/chat/completions", headers=asked | headers)


def test_a_page_may_call_only_where_its_origin_is_allowed():
    with ApiServer("x") as server:
        assert "access-control-allow-origin" not in server.http.get("/health", headers=PAGE).headers
        assert "access-control-allow-origin" not in preflight(server).headers
    with ApiServer("x", allowed_origins=("https://page.example",), api_key="k") as server:
        asked = preflight(server)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://page.example"
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        assert preflight(server, Origin="https://other.example").status_code == 400
        refused = server.http.get("/v1/models", headers=PAGE)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://page.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
    with ApiServer("x", allowed_origins=("*",)) as server:
        assert server.http.get("/health", headers=PAGE).headers["access-control-allow-origin"] == "*"


def test_origins_are_words_or_vllms_json():
    for line in (
        ["--allowed-origins", "https://a", "https://b"],
        ["--cors-allow-origins", '["https://a", "https://b"]'],
    ):
        assert parse(line).server.allowed_origins == ("https://a", "https://b")
    for line in (["--allowed-origins", "[1]"], ["--allowed-origins", "[nope"], ["--allow-credentials"]):
        with pytest.raises(FlagError):
            parse(line)


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key under a password and its own certificate, for the server and as the authority of its clients."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl program to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -sha256 -days 2 -subj /CN=localhost -passout pass:secret"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "rsa", "-in", "key.pem", "-passin", "pass:secret", "-out", "plain.pem"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


def test_https_with_a_password_and_certificates_of_clients(tmp_path: Path, certificates: Path):
    cert, key = str(certificates / "cert.pem"), str(certificates / "key.pem")
    flags = ("--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-keyfile-password", "secret")
    trusting = ssl.create_default_context(cafile=cert)
    with Launched(tmp_path, *flags, "--ssl-ca-certs", cert, "--ssl-cert-reqs", "2") as server:
        url = f"https://127.0.0.1:{server.port}"

        def status(context: ssl.SSLContext) -> int:
            try:
                return urllib.request.urlopen(url + "/v1/models", timeout=5, context=context).status
            except urllib.error.HTTPError as error:
                return error.code
            except (OSError, ssl.SSLError):
                return 0

        assert eventually(lambda: server.pid_file.exists(), 60)
        assert status(trusting) == 0, "a client without a certificate is sent away"
        trusting.load_cert_chain(cert, certificates / "plain.pem")
        assert eventually(lambda: status(trusting) == 200, 30)
        assert status(ssl.create_default_context()) == 0, "the certificate is nobody else's"
        server.process.terminate()
        code, output = server.end()
        assert code == 0 and f"roll! {url}/v1" in output, output


def test_certificates_that_do_not_fit_are_named_before_anything_starts(tmp_path: Path, certificates: Path):
    cert, key, plain = (str(certificates / name) for name in ("cert.pem", "key.pem", "plain.pem"))
    assert tls_options(ServerConfig()) == {}
    assert tls_options(ServerConfig(ssl_certfile=cert, ssl_keyfile=plain))["ssl_certfile"] == cert
    wrong = [
        ({"ssl_certfile": "/nowhere.pem"}, "No such file"),
        ({"ssl_certfile": cert}, "cert.pem"),
        ({"ssl_certfile": cert, "ssl_keyfile": key, "ssl_keyfile_password": "wrong"}, "key.pem"),
        ({"ssl_certfile": cert, "ssl_keyfile": key}, "key.pem"),
        ({"ssl_certfile": cert, "ssl_keyfile": plain, "ssl_ca_certs": plain}, "plain.pem"),
        ({"ssl_certfile": cert, "ssl_keyfile": plain, "ssl_cert_reqs": 2}, "--ssl-ca-certs"),
        ({"ssl_keyfile": plain}, "--ssl-certfile"),
    ]
    for fields, words in wrong:
        with pytest.raises(ConfigError, match=words):
            tls_options(ServerConfig(**fields))
    with Launched(tmp_path, "--ssl-certfile", "/nowhere.pem") as server:
        code, output = server.end(30)
        assert code == 2 and "/nowhere.pem" in output and "Traceback" not in output, output


# The end


def test_while_open_streams_finish_new_requests_are_told_503(tmp_path: Path):
    with Launched(tmp_path, "--shutdown-timeout", "60") as server:
        server.ready()
        body = {"model": "model", "prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode())
        stream = urllib.request.urlopen(request, timeout=20)
        stream.readline()
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        told: set[tuple[int, str | None]] = set()
        while len(told) < 2 and time.monotonic() < started + 2:
            for path in ("/health", "/v1/models"):
                try:
                    urllib.request.urlopen(server.url + path, timeout=5)
                except urllib.error.HTTPError as error:
                    body = json.loads(error.read())
                    code = body["error"]["code"] if path == "/v1/models" and error.headers["retry-after"] else None
                    told.add((error.code, code))
        assert told == {(503, None), (503, "server_stopping")}
        rest = stream.read().decode()
        assert rest.rstrip().endswith("data: [DONE]") and '"finish_reason":"length"' in rest
        code, output = server.end()
        assert code == 0 and time.monotonic() - started < 30, output
        assert not server.engine_alive()


# Clients that take their time


class _Impatient(Connection):
    head_timeout = 0.2


def _send(server: ApiServer, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What comes back before the connection is closed."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        with suppress(OSError):  # closed while there was more to send
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        reply = b""
        with suppress(ConnectionError):
            while piece := connection.recv(65536):
                reply += piece
        return reply


def test_a_head_that_never_ends_is_refused_by_time_and_by_size(monkeypatch):
    with ApiServer("x") as server:
        monkeypatch.setattr(server.server.config, "http_protocol_class", _Impatient)
        for slow in ([b""], [b"GET /health HTTP/1.1\r\n", *[b"a: b\r\n"] * 20]):
            started = time.monotonic()
            assert _send(server, *slow, pause=0.05).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - started < 4
        endless = [b"GET /health HTTP/1.1\r\n", *[b"a: " + b"b" * 8000 + b"\r\n"] * 10]
        assert _send(server, *endless).startswith(b"HTTP/1.1 431 ")
        long = b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"
        assert _send(server, long).startswith(b"HTTP/1.1 431 ")
        patient = b"GET /health HTTP/1.1\r\n\r\nGET /health HTTP/1.1\r\nconnection: close\r\n\r\n"
        assert _send(server, patient).count(b"HTTP/1.1 200 ") == 2
        assert server.chat().status_code == 200, "others are served as ever"


def test_a_body_that_stops_coming_or_is_packed_is_refused(monkeypatch):
    monkeypatch.setattr(jaxserve.api.http, "BODY_TIMEOUT", 0.2)
    head = b"POST %s HTTP/1.1\r\ncontent-length: 1000\r\ncontent-type: multipart/form-data; boundary=x\r\n\r\n"
    with ApiServer("x", store=None) as server:
        reply = _send(server, head % b"/v1/chat/completions" + b'{"model"')
        assert reply.startswith(b"HTTP/1.1 408 ") and b'"request_timeout"' in reply
        packed = server.http.post("/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
        assert error_of(packed, 415)["code"] == "unsupported_media_type" and "gzip" in packed.text
        assert server.complete().status_code == 200


def test_a_path_may_have_a_slash_too_many_and_get_includes_head():
    with ApiServer("x", api_key="k", admin_api_key="a") as server:
        key, admin = ({"authorization": f"Bearer {word}"} for word in "ka")
        body = {"model": MODEL, "prompt": "a"}
        for path in ("/v1/completions/", "/v1//completions", "//v1/completions"):
            assert server.http.post(server.url + path, json=body, headers=key).status_code == 200, path
            assert server.http.post(server.url + path, json=body).status_code == 401, path
        assert server.http.get("/v1/models/", headers=key).json()["data"][0]["id"] == MODEL
        for path in ("/flush_cache/", "//flush_cache"):
            assert server.http.get(server.url + path, headers=key).status_code == 401, path
            assert server.http.get(server.url + path, headers=admin).status_code == 200, path
        for path in ("/health", "/ping", "/v1/models", f"/v1/models/{MODEL}", "/metrics", "/docs", "/openapi.json"):
            got, head = (getattr(server.http, way)(path, headers=key) for way in ("get", "head"))
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-type"] == got.headers["content-type"] if got.content else True
        for path, headers, allowed in (
            ("/flush_cache", admin, "GET, POST"),
            ("/v1/files", key, "GET, HEAD, POST"),
            ("/v1/chat/completions/", key, "POST"),
        ):
            refused = server.http.request("PATCH", path, headers=headers)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert server.http.head("/flush_cache", headers=admin).status_code == 405


def test_replies_of_openais_routes_have_its_headers():
    with ApiServer(script=slowly) as server:
        reply = server.complete(max_tokens=20, ignore_eos=True)
        assert 90 <= int(reply.headers["openai-processing-ms"]) < 20_000
        assert reply.headers["openai-version"] == "2020-10-01" and reply.headers["x-request-id"]
        assert "openai-version" in server.http.get("/v1/nope").headers
        assert "openai-version" not in server.http.get("/health").headers
