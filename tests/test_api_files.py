"""/v1/files through the openai client and by hand: forms of every shape, limits, paging, expiry."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.api import files
from jaxserve.api.errors import APIError
from jaxserve.api.multipart import Form
from jaxserve.store.sqlite import SQLiteStore
from tests.api_server import ApiServer, error_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    store = SQLiteStore(tmp_path_factory.mktemp("files") / "store")
    store.recover()
    with ApiServer(store=store) as server:
        yield server
    store.close()


def incoming(server: ApiServer) -> list[Path]:
    return list((server.store.path / "incoming").iterdir())


def test_a_file_comes_back_as_it_went_in(server: ApiServer):
    content = bytes(range(256)) * 20_000
    file = server.openai.files.create(file=('r\u00e9sum\u00e9 "1".jsonl', content), purpose="batch")
    assert file.id.startswith("file-") and file.object == "file" and file.status == "processed"
    assert (file.bytes, file.purpose, file.filename) == (len(content), "batch", 'r\u00e9sum\u00e9 "1".jsonl')
    assert file.expires_at == file.created_at + files.DEFAULT_EXPIRY
    assert server.openai.files.retrieve(file.id) == file
    assert server.openai.files.content(file.id).read() == content
    deleted = server.openai.files.delete(file.id)
    assert deleted.deleted is True and deleted.id == file.id and deleted.object == "file"
    for call in (server.openai.files.retrieve, server.openai.files.content, server.openai.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            call(file.id)


def test_names_and_ids_reach_nothing_outside(server: ApiServer):
    before = set(server.store.path.parent.rglob("*"))
    file = server.openai.files.create(file=("../../../etc/passwd.jsonl", b"{}"), purpose="batch")
    after = set(server.store.path.parent.rglob("*"))
    assert all(server.store.path in path.parents for path in after - before)
    assert server.openai.files.content(file.id).read() == b"{}"
    for name in ("..%2F..%2Fstore.sqlite3", "%2e%2e", "file-%00", "file-" + "x" * 5000, "file-'--"):
        for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
            assert server.http.get(path).status_code == 404, path
        assert server.http.delete(f"/v1/files/{name}").status_code == 404


def form(*parts: tuple[str, str | None, bytes], boundary: bytes = b"b0und") -> tuple[bytes, dict[str, str]]:
    body = b""
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        body += b"--" + boundary + f'\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + b"--" + boundary + b"--\r\n", {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}


def post(server: ApiServer, *parts: tuple[str, str | None, bytes]) -> httpx2.Response:
    body, headers = form(*parts)
    return server.http.post("/v1/files", content=body, headers=headers)


def test_the_fields_may_come_in_any_order(server: ApiServer):
    reply = post(
        server,
        ("file", "a.jsonl", b"{}\n"),
        ("other", None, b"x"),
        ("expires_after[seconds]", None, b"7200"),
        ("purpose", None, b"batch"),
        ("expires_after[anchor]", None, b"created_at"),
    )
    assert reply.status_code == 200, reply.text
    file = reply.json()
    assert file["expires_at"] == file["created_at"] + 7200 and file["purpose"] == "batch"


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("file", "a.jsonl", b"")], "purpose"),
        ([("purpose", None, b"batch")], "file"),
        ([("purpose", None, b"mischief"), ("file", "a.jsonl", b"")], "purpose"),
        ([("purpose", None, b"batch"), ("file", "a.json", b"")], "file"),
        ([("file", "a.json", b""), ("purpose", None, b"batch")], "file"),
        ([("purpose", None, b"batch"), ("file", "a.jsonl", b""), ("file", "b.jsonl", b"")], "file"),
        ([("purpose", None, b"batch"), ("expires_after[seconds]", None, b"7200"), ("file", "a.jsonl", b"")],
         "expires_after.anchor"),
        ([("purpose", None, b"batch"), ("expires_after[seconds]", None, b"9"),
          ("expires_after[anchor]", None, b"created_at"), ("file", "a.jsonl", b"")], "expires_after.seconds"),
    ],
)  # fmt: skip
def test_a_wrong_upload_is_refused_by_field_and_leaves_nothing(server: ApiServer, parts: list, param: str):
    assert error_of(post(server, *parts), 400)["param"] == param
    assert not incoming(server)


def test_files_over_the_limit_of_their_purpose_are_refused(server: ApiServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_BATCH_FILE_SIZE", 3_000_000)
    monkeypatch.setattr(files, "MAX_FILE_SIZE", 4_000_000)
    content = b"x" * 3_500_000
    for parts in (
        [("purpose", None, b"batch"), ("file", "a.jsonl", content)],
        [("file", "a.jsonl", content), ("purpose", None, b"batch")],
        [("file", "a.jsonl", content + content)],
    ):
        assert error_of(post(server, *parts), 413)["code"] == "file_too_large"
    assert not incoming(server)
    assert post(server, ("purpose", None, b"user_data"), ("file", "a.bin", content)).status_code == 200


def test_files_may_be_larger_than_other_bodies(tmp_path: Path):
    store = SQLiteStore(tmp_path / "store")
    store.recover()
    with ApiServer(store=store, max_body_size=1) as server:
        file = server.openai.files.create(file=("a.jsonl", bytes(2_500_000)), purpose="batch")
        assert file.bytes == 2_500_000
        assert error_of(server.post("/v1/batches", bytes(2_500_000)), 413)
    store.close()


@pytest.mark.parametrize(
    "body", [b"", b"--b0und", b"--b0und\r\nX: y", b"junk" * 10_000, form(("purpose", None, b"x"))[0][:-9]]
)
def test_a_broken_form_is_400(server: ApiServer, body: bytes):
    headers = {"content-type": "multipart/form-data; boundary=b0und"}
    assert error_of(server.http.post("/v1/files", content=body, headers=headers), 400)["code"] == "invalid_form"
    assert not incoming(server)


def test_a_body_that_is_no_form_is_400(server: ApiServer):
    assert error_of(server.post("/v1/files", {"purpose": "batch"}), 400)["code"] == "invalid_form"


def test_lists_are_paged_ordered_and_filtered(tmp_path: Path):
    store = SQLiteStore(tmp_path / "store")
    store.recover()
    with ApiServer(store=store) as server:
        make = server.openai.files.create
        ids = [make(file=("a.jsonl", b""), purpose="user_data" if i == 2 else "batch").id for i in range(5)]
        assert [file.id for file in server.openai.files.list(limit=2)] == ids[::-1]
        assert [file.id for file in server.openai.files.list(order="asc", limit=2)] == ids
        assert [file.id for file in server.openai.files.list(purpose="user_data")] == [ids[2]]
        page = server.http.get("/v1/files?limit=2&order=asc").json()
        assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[0], ids[1], True)
        for query in ("limit=0", "limit=x", "limit=10001", "order=up"):
            error_of(server.http.get("/v1/files?" + query), 400)
        error_of(server.http.get("/v1/files?after=file-0"), 404)
    store.close()


contents = st.binary(max_size=60) | st.sampled_from(
    [b"\r\n", b"\r\n--b0un", b"--b0und", b"\r", b"\r\n--", b"\n--b0und--"]
)


@given(st.lists(contents, min_size=1, max_size=4), st.integers(1, 9))
def test_a_form_is_read_the_same_however_it_is_cut(values: list[bytes], size: int):
    values = [value for value in values if b"\r\n--b0und" not in b"\r\n" + value]
    body, headers = form(*((str(index), None, value) for index, value in enumerate(values)))

    async def chunks() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def read() -> list[tuple[str, bytes]]:
        parsed, found = Form(chunks(), headers["content-type"]), []
        while (part := await parsed.next_part()) is not None:
            content = b""
            while piece := await parsed.read():
                content += piece
            found.append((part.name, content))
        return found

    assert asyncio.run(read()) == [(str(index), value) for index, value in enumerate(values)]


def test_a_part_without_an_end_to_its_header_is_refused():
    async def endless() -> AsyncGenerator[bytes, None]:
        yield b"--b\r\n"
        while True:
            yield b"x" * 1000

    async def read() -> None:
        await Form(endless(), "multipart/form-data; boundary=b").next_part()

    with pytest.raises(APIError, match="header is longer"):
        asyncio.run(read())
