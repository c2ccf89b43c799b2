"""Builds the documentation as a site, from a run of the demo:

    python docs/build.py            or `make docs`, which makes runs/demo first where it is missing

Each of the seven notebooks is executed by the command in its first cell, on that run, and shown as it ended. What has
been executed since its code and the run changed is taken as it is. No network is needed.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "runs" / "demo" / "metrics.json"  # written at the end of a run
SECOND = """recnb run 02_train -p config configs/demo.yaml \
    -p run_dir runs/demo-no-margin -y '{overrides: {Arch.Head.margin: 0.0}}'"""  # for 06


def main() -> None:
    if not DEMO.is_file():
        sys.exit("there is no run of the demo to show: `make demo` makes it")
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    executed(SECOND, notebooks[1], ROOT / "runs" / "demo-no-margin" / "train.ipynb")
    for notebook in notebooks:
        output = ROOT / "docs" / "_build" / "notebooks" / notebook.name
        publish(executed(command_of(notebook), notebook, output), notebook)
    sphinx = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going", "docs", "docs/_build/html"]
    failed = subprocess.call(sphinx, cwd=ROOT)
    print("the pages have warnings, see above" if failed else "documentation: docs/_build/html/index.html")
    sys.exit(failed)


def command_of(notebook: Path) -> str:
    """The last command that the first cell of a notebook shows."""
    return re.findall(r"^```\n(.+)\n```$", nbformat.read(notebook, 4).cells[0].source, re.MULTILINE)[-1]


def executed(command: str, source: Path, output: Path) -> Path:
    """The notebook that a command leaves; it is run unless that has been done with this code on this run."""
    if output.is_file() and output.stat().st_mtime > DEMO.stat().st_mtime and code(source) == code(output):
        return output
    print(command, flush=True)
    words = [sys.executable, "-m", *shlex.split(command), "--to", str(output)]
    if subprocess.call(words, cwd=ROOT):
        output.unlink(missing_ok=True)
        sys.exit("ended with an error, see above")
    return output


def code(notebook: Path) -> dict[str, str]:
    """The code of a notebook by cell, without the parameters that it was run with."""
    return {
        cell.id: cell.source
        for cell in nbformat.read(notebook, 4).cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", ())
    }


def publish(executed: Path, source: Path) -> None:
    """Write an executed notebook to docs/notebooks: with today's prose, paths in the project, no widgets."""
    text = executed.read_text(encoding="utf-8").replace(f"{json.dumps(str(ROOT))[1:-1]}/", "")
    notebook, today = nbformat.reads(text, 4), nbformat.read(source, 4)
    prose = {cell.id: cell.source for cell in today.cells if cell.cell_type == "markdown"}
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.source = prose.get(cell.id, cell.source)
        for output in cell.get("outputs", []):
            if output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None):  # needs a kernel
                output["data"] = {"text/markdown": "*Here a running notebook shows the interactive gallery.*"}
    nbformat.write(notebook, ROOT / "docs" / "notebooks" / source.name)


if __name__ == "__main__":
    main()
