"""What stands before the routes: keys, origins, TLS, and the way a server ends."""

import json
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jaxserve.config import ConfigError, ServerConfig
from jaxserve.flags import FlagError, parse
from jaxserve.service import tls_options
from tests.api_server import ApiServer, error_of
from tests.test_api_launch import Launched, eventually

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
