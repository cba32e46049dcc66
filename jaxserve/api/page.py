"""The page at /: static files of this package, under headers that let it ask this server and nobody else."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Scope

FOLDER = Path(__file__).resolve().parent / "ui"
PREFIX = "/ui/"
# What a model writes is shown as HTML that DOMPurify made; if it ever failed, this would still hold: no script that is
# not a file of ours, no style in the text, no request elsewhere, no HTML from strings that bypass DOMPurify.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # it is asked for again each time, and mostly answered by 304
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """/ and its files below /ui/."""

    async def page(_request: Request) -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    app.add_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount(PREFIX.rstrip("/"), _Files(directory=FOLDER), name="ui")


def is_page(path: str) -> bool:
    """True for what needs no key: a browser that opens the page has none yet."""
    return path == "/" or path.startswith(PREFIX)
