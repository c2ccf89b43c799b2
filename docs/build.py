"""Builds the documentation as a site, from a run of the demo:

    python docs/build.py            or `make docs`, which makes runs/demo first where it is missing

The seven notebooks are executed on that run into runs/docs, and shown as they ended. What has been executed since its
code and the run changed is taken as it is; remove runs/docs to execute everything again. No network is needed.
"""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = ROOT / "runs" / "docs"
RUN = "python scripts/run_notebook.py"
COMMANDS = {  # notebook: the words behind `notebooks/NAME.ipynb runs/docs/NAME.ipynb`
    "01_prepare": "-p source data/demo/images -p out_dir data/prepared",
    "03_evaluate": "-p run runs/demo",
    "04_gallery": "-p run runs/demo -p other runs/docs/no-margin",
    "05_export": "-p run runs/demo",
    "06_compare": "-y '{run_dirs: [runs/demo, runs/docs/no-margin], pattern: \"\", out_dir: runs/docs/compare}'",
    "07_benchmark": "-p known docs/benchmarks/training-2-cores-x86_64.json",
}
SECOND = ("runs/docs/no-margin/train.ipynb", "-p config configs/demo.yaml -p run_dir runs/docs/no-margin "
          "-y '{overrides: {Arch.Head.margin: 0.0}}'")  # what 04 and 06 hold against the demo


def main() -> None:
    demo = ROOT / "runs" / "demo"
    if not (demo / "metrics.json").is_file():
        sys.exit("there is no run of the demo to show: `make demo` makes it")
    execute("02_train", ROOT / SECOND[0], SECOND[1])
    publish(demo / "train.ipynb", "02_train")
    for name, words in COMMANDS.items():
        execute(name, EXECUTED / f"{name}.ipynb", words)
        publish(EXECUTED / f"{name}.ipynb", name)
    sphinx = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going", "docs", "docs/_build/html"]
    failed = subprocess.call(sphinx, cwd=ROOT)
    print("the pages have warnings, see above" if failed else "documentation: docs/_build/html/index.html")
    sys.exit(failed)


def execute(name: str, output: Path, words: str) -> None:
    """Run a notebook by the command that its page names, unless that has been done with this code on this run."""
    source, demo = ROOT / "notebooks" / f"{name}.ipynb", ROOT / "runs" / "demo" / "metrics.json"
    if output.is_file() and output.stat().st_mtime > demo.stat().st_mtime and code(source) == code(output):
        return
    command = [*shlex.split(RUN), str(source), str(output.relative_to(ROOT)), *shlex.split(words)]
    print(shlex.join(command), flush=True)
    if subprocess.call([sys.executable, *command[1:]], cwd=ROOT):
        output.unlink(missing_ok=True)
        sys.exit(f"{name} ended with an error, see above")


def code(notebook: Path) -> dict[str, str]:
    """The code of a notebook by cell, without the parameters that it was run with."""
    return {cell.id: cell.source for cell in nbformat.read(notebook, 4).cells
            if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", ())}


def publish(executed: Path, name: str) -> None:
    """Write an executed notebook to docs/notebooks: with today's prose, paths in the project, no widgets."""
    text = executed.read_text(encoding="utf-8").replace(f"{json.dumps(str(ROOT))[1:-1]}/", "")
    notebook, today = nbformat.reads(text, 4), nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    prose = {cell.id: cell.source for cell in today.cells if cell.cell_type == "markdown"}
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.source = prose.get(cell.id, cell.source)
        for output in cell.get("outputs", []):
            if output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None):  # needs a kernel
                output["data"] = {"text/markdown": "*Here a running notebook shows the interactive gallery.*"}
    nbformat.write(notebook, ROOT / "docs" / "notebooks" / f"{name}.ipynb")


if __name__ == "__main__":
    main()
