"""Runs notebooks/*.py and writes each as .ipynb with what it shows: python -m tools.notebooks [NAME ...]"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CELL_SECONDS = 600


def sources() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.py"))}


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook that a .py in percent format stands for, without outputs."""
    notebook = jupytext.read(path, fmt="py:percent")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"  # not a random one: the same file gives the same notebook
    return notebook


def execute(path: Path, environ: Mapping[str, str]) -> nbformat.NotebookNode:
    """The notebook with its outputs. Raises nbclient's CellExecutionError with the cell and its traceback."""
    notebook = read(path)
    resources = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, resources=resources, coalesce_streams=True)
    client.execute(env={**os.environ, **environ})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})  # when each cell ran is of interest to nobody
        if cell.cell_type == "code":  # warnings on standard error name the folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    path.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")


def main(names: list[str]) -> int:
    known = sources()
    if unknown := [name for name in names if name not in known]:
        print(f"there is no notebook {unknown[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="notebooks-") as data:
        for name in names or known:
            started = time.monotonic()
            write(execute(known[name], {"XDG_DATA_HOME": data}), FOLDER / f"{name}.ipynb")
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
