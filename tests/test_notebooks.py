"""Notebooks do what they show: each .ipynb is its .py with outputs, and running it ends without an error."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="notebooks need more packages: make notebooks installs them")
pytest.importorskip("nbclient")

from tools import notebooks

NAMES = sorted(notebooks.sources())
MAX_BYTES = 400_000


def written(name: str) -> dict:
    return json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def test_every_source_has_its_notebook_and_a_line_in_the_list():
    assert {path.stem for path in notebooks.FOLDER.glob("*.ipynb")} == set(NAMES)
    listed = (notebooks.FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in listed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source_with_what_it_shows(name):
    cells, source = written(name)["cells"], notebooks.read(notebooks.FOLDER / f"{name}.py").cells
    assert [(c["cell_type"], "".join(c["source"])) for c in cells] == [(c.cell_type, c.source) for c in source], (
        f"run: make notebooks ARGS={name}"
    )
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == sum("".join(cell["source"]).count("plt.show()") for cell in cells)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_tells_nothing_of_the_machine_it_ran_on(name):
    text = (notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    assert str(Path.home()) + "/" not in text and str(notebooks.FOLDER.parent) not in text
    assert not re.search(r"/(home|Users|root)/\w", text)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_code_cell_installs_what_is_missing(name):
    first = next(cell for cell in notebooks.read(notebooks.FOLDER / f"{name}.py").cells if cell.cell_type == "code")
    assert 'find_spec("jaxserve")' in first.source and "pip" in first.source and "import jax\n" not in first.source


def test_the_notebook_of_the_api_runs_against_a_server(live):
    notebooks.execute(notebooks.FOLDER / "openai_api.py", {"JAXSERVE_URL": live.url})


def test_the_notebook_of_pages_runs(monkeypatch):
    """In this process, since it needs no model."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = "\n".join(
        cell.source
        for cell in notebooks.read(notebooks.FOLDER / "paged_attention.py").cells
        if cell.cell_type == "code"
    )
    names: dict = {}
    exec(compile(code, "paged_attention.py", "exec"), names)
    assert float(abs(names["paged"] - names["dense"]).max()) < 1e-5
    assert names["answers"].keys() == {0, 1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_nothing(name, cache_dir, tmp_path):
    environ = {"JAXSERVE_CACHE_DIR": cache_dir, "XDG_DATA_HOME": str(tmp_path)}
    notebooks.execute(notebooks.FOLDER / f"{name}.py", environ)
