"""The documents say what the code does: pages that are written from tables are current, and what they name exists."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxserve.api.app import ROUTES
from jaxserve.api.generate_schema import (
    REFUSED_IN_GENERATE,
    REFUSED_IN_SAMPLING,
    GenerateRequest,
    NativeSampling,
)
from jaxserve.api.schema import (
    REFUSED,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    WITHOUT_EFFECT,
    ChatRequest,
    CompletionRequest,
)
from tools import api_doc
from tools.flags_doc import page

ROOT = Path(__file__).resolve().parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Row:
    heading: str
    cells: tuple[str, ...]
    tested: bool  # the table's last column names tests

    @property
    def names(self) -> list[str]:
        """What stands in backticks in the first cell."""
        return quoted(self.cells[0])


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def rows(text: str) -> Iterator[Row]:
    """The rows of every table, under the heading that stands above it."""
    heading, tested, inside = "", False, False
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            inside = False
            continue
        cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        if not inside:
            tested, inside = cells[-1] == "test", True
        elif not set(cells[0]) <= set("-: "):
            yield Row(heading, cells, tested)


ROWS = list(rows(API))


def fields_of(path: str) -> Counter[str]:
    """Every name in a table whose heading names the route, and how often."""
    sections = [row for row in ROWS if path in quoted(row.heading)]
    return Counter(name for row in sections for name in row.names)


def test_the_page_of_flags_is_current():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page(), "run: make docs"


def test_the_tables_of_refused_fields_are_current():
    assert api_doc.updated(API) == API, "run: make docs (python -m tools.api_doc)"


def test_every_route_has_one_row():
    stated: Counter[tuple[str, str]] = Counter()
    for row in ROWS:
        if row.heading == "Routes":
            methods = re.findall(r"\b[A-Z]{3,6}\b", re.sub(r"`[^`]*`", "", row.cells[0]))
            stated.update((method, path) for method in methods for path in row.names)
    served = {
        (method, path.replace(":path}", "}")) for paths, methods, *_ in ROUTES for path in paths for method in methods
    }
    assert set(stated) == served, f"not in the table or not served: {set(stated) ^ served}"
    assert set(stated.values()) == {1}, [route for route, count in stated.items() if count > 1]


@pytest.mark.parametrize(
    ("path", "model"),
    [(path, model) for paths, _, _, model in ROUTES if model is not None for path in paths],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_has_one_row_for_each_route(path, model):
    expected = set(model.model_fields)
    if model is GenerateRequest:
        expected |= {*NativeSampling.model_fields, *REFUSED_IN_GENERATE, *REFUSED_IN_SAMPLING}
    if model in (ChatRequest, CompletionRequest):
        own = REFUSED_IN_CHAT if model is ChatRequest else REFUSED_IN_COMPLETIONS
        expected |= {*REFUSED, *own, *WITHOUT_EFFECT}
    found = fields_of(path)
    assert expected <= set(found), (
        f"a section of docs/api.md with `{path}` in its heading lacks {expected - set(found)}"
    )
    if model in (ChatRequest, CompletionRequest):
        assert set(found) == expected, f"docs/api.md has {set(found) - expected}, which {path} does not know"
    assert not [name for name, count in found.items() if count > 1], found.most_common(3)


def test_a_field_belongs_to_one_class():
    for model, own in ((ChatRequest, REFUSED_IN_CHAT), (CompletionRequest, REFUSED_IN_COMPLETIONS)):
        names = Counter([*model.model_fields, *WITHOUT_EFFECT, *{**REFUSED, **own}])
        assert set(names.values()) == {1}, names.most_common(3)


def test_every_row_names_tests_that_exist():
    tests = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests |= set(re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    for row in ROWS:
        if row.tested:
            named = quoted(row.cells[-1])
            assert named, f"{row.heading}: {row.cells[0]} names no test"
            assert set(named) <= tests, f"{row.heading}: {row.cells[0]} names {set(named) - tests}, which do not exist"


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
