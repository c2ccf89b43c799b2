"""The house rules, as far as a machine can hold them; each failure lists every place that breaks the rule."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from size import sizes, statements

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "recnb").rglob("*.py"))
SOURCES = [*CHAPTERS, *(path for name in ("tests", "scripts", "benchmarks") for path in (ROOT / name).rglob("*.py"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROWS = [
    "cli",
    "deploy",
    "runs",
    "recipe",
    "training gallery",
    "losses",
    "models data",
    "distributed storage",
    "registry retrieval demo",
]  # a folder imports those in lower rows only
READS_YAML = {"recipe", "runs", "deploy", "cli"}
ONLY = {
    "fastai": {"adaptor"},
    "timm": {"backbones", "cutting"},
    "faiss": {"search"},
    "ipywidgets": {"grid", "hits", "widget"},
    "papermill": {"notebook"},
}
FRAMEWORK = ("Module", "Dataset", "Sampler", "Callback")


@functools.cache
def nodes(path):
    """Every node of a source file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def place(path, node=None):
    return f"{path.relative_to(ROOT)}{f':{node.lineno}' if node else ''}"


def imported(path):
    """Every (module, node) that a source file imports, at its top or inside a function."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def called(node):
    """The dotted name of what a call calls."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def files_of_the_project():
    """What git tracks or would track, or everything but hidden and built folders where there is no git."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and not any(
            part.startswith(".") or part in ("runs", "data", "weights") for part in path.relative_to(ROOT).parts[:-1]
        )
    ]


def none_of(broken):
    broken = list(broken)
    assert not broken, "\n  ".join(["", *map(str, broken)])


def test_no_star_imports_no_eval_no_exec():
    none_of(
        f"{place(path, node)}: import *"
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    )
    none_of(
        f"{place(path, node)}: {called(node)}"
        for path in SOURCES
        for node in nodes(path)
        if called(node) in ("eval", "exec", "builtins.eval", "builtins.exec")
    )


def test_files_are_read_without_running_code():
    unsafe = ("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "joblib.load")
    none_of(
        f"{place(path, node)}: {called(node)}"
        for path in CHAPTERS
        for node in nodes(path)
        if called(node) in unsafe
        or (
            called(node) == "torch.load"
            and not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        )
    )
    none_of(
        f"{place(path, node)}: allow_pickle"
        for path in CHAPTERS
        for node in nodes(path)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    )


def test_tables_are_written_in_one_place_that_lets_no_spreadsheet_run_a_cell():
    none_of(
        f"{place(path, node)}: {called(node)}"
        for path in CHAPTERS
        for node in nodes(path)
        if called(node).endswith((".to_csv", "csv.writer", "DictWriter")) and place(path) != "recnb/data/lists.py"
    )
    none_of(place(path) for path in NOTEBOOKS if "to_csv(" in path.read_text(encoding="utf-8"))


def test_pickles_are_read_in_one_place_that_admits_nothing_but_arrays():
    readers = {"Unpickler", "_Unpickler", "_load", "_loads"}
    used = {
        (path.relative_to(ROOT / "recnb").as_posix(), node.attr)
        for path in CHAPTERS
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr in readers
    }
    assert used == {("models/paddle.py", "Unpickler")}, (
        "the original's weights are pickles; no other file is read as one"
    )
    assert not [
        module
        for path in CHAPTERS
        for module, _ in imported(path)
        if module.startswith("pickle.") and module.split(".")[1] in readers
    ]
    extended = [
        node
        for node in nodes(ROOT / "recnb/models/paddle.py")
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases)
    ]
    assert len(extended) == 1 and "find_class" in [getattr(method, "name", "") for method in extended[0].body]


def lines_of_code(function):
    """How many lines a function has, its docstring apart."""
    text = function.body[0] if ast.get_docstring(function) else None
    return function.end_lineno - function.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def test_functions_are_short():
    none_of(
        f"{place(path, node)} {node.name}: {lines_of_code(node)} lines"
        for path in SOURCES
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef) and lines_of_code(node) > 55
    )


def test_lines_are_short():
    none_of(
        f"{place(path)}:{number}: {len(line)} columns"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120
    )


def test_chapters_are_short_and_the_package_thin():
    counts = sizes(each_module=True)
    table = "\n".join(f"{count:>7} {name}" for name, count in counts.items())
    kit = counts.pop("total") - sum(count for name, count in counts.items() if name.startswith("demo/"))
    assert max(counts.values()) <= 250, f"a chapter has at most 250 statements\n{table}"
    assert kit <= 12000, f"the kit has at most 12,000 statements, the demo's drawings apart; it has {kit}\n{table}"


def test_a_statement_over_several_lines_counts_once():
    source = (
        '"""A text."""\n\n# a comment\nx = [\n    1,\n    2,\n]\n\n\ndef f():\n    "Another."\n    return x; y = 1\n'
    )
    assert len(statements(source)) == 3


def test_no_chapter_for_odds_and_ends():
    assert not {path.stem for path in CHAPTERS} & {"utils", "util", "helpers", "common", "misc"}


def test_each_framework_has_its_chapter():
    none_of(
        f"{place(path, node)}: {module}"
        for path in CHAPTERS
        for module, node in imported(path)
        if path.stem not in ONLY.get(module.split(".")[0], {path.stem})
    )
    none_of(
        f"{place(path, node)}: {module}"
        for path in SOURCES
        for module, node in imported(path)
        if module.startswith("fastai.") and module.split(".")[-1] in ("all", "basics")
    )


def folder_of(path: Path) -> str:
    """The folder of the package that a module belongs to, or its own name where it is beside the folders."""
    return path.relative_to(ROOT / "recnb").parts[0].removesuffix(".py")


def test_arrows_point_down():
    row = {name: i for i, names in enumerate(ROWS) for name in names.split()}
    assert {folder_of(path) for path in CHAPTERS} - {"__init__", "__main__"} == set(row), "each folder has its row"
    none_of(
        sorted(
            {
                f"{place(path, node)}: {folder_of(path)} imports {module}"
                for path in CHAPTERS
                for module, node in imported(path)
                if module.startswith("recnb.")
                for own, other in [(folder_of(path), module.split(".")[1])]
                if own in row and other in row and own != other and row[other] <= row[own]
            }
        )
    )


def test_yaml_is_read_in_one_wing():
    none_of(
        f"{place(path, node)}: cfg"
        for path in CHAPTERS
        if folder_of(path) not in READS_YAML
        for node in nodes(path)
        if "cfg" in (getattr(node, "id", ""), getattr(node, "arg", ""))
    )


def test_at_most_one_level_of_own_inheritance():
    own = {
        node.name: [ast.unparse(base).split(".")[-1] for base in node.bases]
        for path in CHAPTERS
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
    }
    none_of(
        f"{name} extends {base}, which extends {', '.join(own[base])}"
        for name, bases in own.items()
        for base in bases
        if own.get(base)
    )
    none_of(f"{name}: an abstract base" for name, bases in own.items() if {"ABC", "Protocol", "ABCMeta"} & set(bases))


def test_a_class_never_receives_a_configuration():
    none_of(
        f"{place(path, method)} {node.name}.{method.name}"
        for path in CHAPTERS
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
        if {"cfg", "config"} & {arg.arg for arg in (*method.args.args, *method.args.kwonlyargs)}
    )


def test_everything_public_has_a_docstring():
    none_of(
        f"{place(path)}: the chapter itself"
        for path in CHAPTERS
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    )
    none_of(
        f"{place(path, node)} {node.name}"
        for path in CHAPTERS
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    )


def test_modules_say_their_shapes():
    none_of(
        f"{place(path, method)} {node.name}.forward"
        for path in CHAPTERS
        for lines in [path.read_text(encoding="utf-8").splitlines()]
        for node in nodes(path)
        if isinstance(node, ast.ClassDef) and "nn.Module" in map(ast.unparse, node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
        if "out: dict" not in ast.unparse(method.args)
        and not re.search(r"# .*\(", " ".join(lines[method.lineno - 1 : method.body[0].lineno]))
    )


def test_importing_is_light():
    code = (
        "import sys, recnb.cli.main; from recnb.cli import notebook; "
        "notebook.check(notebook.find('02_train'), {'config': 'configs/demo.yaml'}); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "import recnb.retrieval.metrics, recnb.retrieval.neighbours; "
        "assert not {'pandas', 'scipy', 'numba'} & set(sys.modules); import recnb.gallery.figure; "
        f"print(*sorted({{name.split('.')[0] for name in sys.modules}} & {set(ONLY)!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [["check", ".", "--output-format", "concise"], ["format", "--check", "."]])
def test_ruff_finds_nothing(arguments):
    result = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_paths_of_one_machine():
    pattern = re.compile(r"(?<![\w.:/~-])/(?:" + "|".join(["work", "root", "home", "Users"]) + r")(?:/|\b)")
    none_of(
        f"{place(path)}:{number}: {line.strip()[:80]}"
        for path in files_of_the_project()
        for number, line in enumerate(path.read_bytes().decode("utf-8", "ignore").splitlines(), 1)
        if path.suffix not in (".npz", ".jpg", ".png") and pattern.search(line)
    )


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebooks_are_valid_and_hold_no_output(notebook):
    nbformat.validate(notebook)
    none_of(cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None)


def test_cell_ids_are_words(notebook):
    ids = [cell.id for cell in notebook.cells]
    none_of(name for name in ids if not re.fullmatch(r"[a-z]{2,}(-[a-z]{2,})*", name) or ids.count(name) > 1)


def test_notebooks_are_short(notebook):
    assert len(code_cells(notebook)) <= 20
    none_of(
        f"{cell.id}: {len(cell.source.splitlines())} lines"
        for cell in code_cells(notebook)
        if len(cell.source.splitlines()) > 15
    )
    none_of(
        f"{cell.id}: {line}" for cell in code_cells(notebook) for line in cell.source.splitlines() if len(line) > 120
    )
    assert notebook.cells[0].cell_type == "markdown"


def test_notebooks_begin_with_plain_parameters(notebook):
    first, *others = code_cells(notebook)
    assert "parameters" in first.metadata.get("tags", ())
    assert not any("parameters" in cell.metadata.get("tags", ()) for cell in others)
    statements = ast.parse(first.source).body
    assert 1 <= len(statements) <= 4 and all(isinstance(node, ast.AnnAssign) for node in statements)
    assert {ast.unparse(node.annotation) for node in statements} <= {"str", "int", "float", "bool", "dict", "list"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_and_explain_their_parameters(path):
    assert path.stat().st_size <= 30_000
    parameters = papermill.inspect_notebook(str(path))
    assert parameters and all(entry["help"] and entry["inferred_type_name"] for entry in parameters.values())


def test_the_parameters_of_the_training_notebook():
    parameters = papermill.inspect_notebook(str(ROOT / "notebooks" / "02_train.ipynb"))
    assert {name: entry["inferred_type_name"] for name, entry in parameters.items()} == {
        "config": "str",
        "run_dir": "str",
        "overrides": "dict",
        "find_lr": "bool",
    }
