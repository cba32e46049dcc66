"""The documents say what the code does: pages that are written from tables are current, and what they name exists."""

import re
from pathlib import Path

from jaxserve.api.app import ROUTES
from jaxserve.api.schema import ChatRequest, CompletionRequest
from tools.flags_doc import page

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page(), "run: make docs"


def test_the_page_of_the_api_names_every_route_and_field():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    routes = {path.replace("{model:path}", "{id}") for paths, *_ in ROUTES for path in paths}
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    missing = [name for name in sorted(routes | fields) if f"`{name}`" not in text]
    assert not missing, f"docs/api.md does not name {missing}"


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
