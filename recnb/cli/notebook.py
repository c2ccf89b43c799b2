"""A notebook is checked, run by papermill, and followed in the terminal.

What can be known to be wrong without torch is said before a kernel starts: a parameter that the notebook does not have,
a value of another type, a key of the config or an override that cannot be meant, a run folder that holds no run. The
parts that a config names are checked by the notebook itself, so that torch and timm are loaded once.
"""

import ast
import importlib
import json
import logging
import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from recnb.cli.progress import epochs_shown
from recnb.recipe.reading import parse
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError, check_known, fits, suggest
from recnb.storage import resolve

KINDS = {kind.__name__: kind for kind in (str, int, float, bool, dict, list)}
OPTIONS = {"01_prepare": ("recnb.data.prepare", "read_options"), "03_evaluate": ("recnb.runs.analysis", "chosen")}
OWN = ("ConfigError", "DataError", "ExportError", "LockedError", "TrainingError")  # their messages need no name
REFUSALS = ("ConfigError", "DataError", "LockedError")
KERNEL = ["--IPKernelApp.log_level=CRITICAL"]  # it warns of TCP, and tells how it was ended


class FailedError(RuntimeError):
    """A notebook has not been run to its end."""


def find(notebook: str | Path) -> Path:
    """Return the file of a notebook that is given as a path, or by the name of one in notebooks/.

    Raises:
        ConfigError: There is none; the message offers the nearest name.
    """
    path = resolve(notebook)
    if path.is_file():
        return path
    folder = path.parent if path.suffix else resolve("notebooks")
    if (named := folder / f"{path.stem}.ipynb").is_file():
        return named
    raise ConfigError(
        f"{notebook}: there is no such notebook; {suggest(path.stem, (other.stem for other in folder.glob('*.ipynb')))}"
    )


@dataclass
class Parameter:
    """What a notebook says of one of its parameters."""

    kind: type
    default: object


def known(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters of a notebook by name; `object` is the kind of one without an annotation."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    found = {}
    for node in ast.parse(source[0]).body if source else ():
        if isinstance(node, ast.AnnAssign) and node.value:
            found[ast.unparse(node.target)] = KINDS.get(ast.unparse(node.annotation), object), node.value
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = object, node.value
    return {name: Parameter(kind, ast.literal_eval(value)) for name, (kind, value) in found.items()}


def values_of(notebook: Path, parameters: dict) -> dict:
    """Return all parameters of a notebook: those that are given, and the others as the notebook has them."""
    return {**{name: parameter.default for name, parameter in known(notebook).items()}, **parameters}


def parameters_of(notebook: Path, pairs: list[tuple[str, str]], text: str = "") -> dict:
    """Return the checked parameters that `-p` and `-y` give.

    A value of `-p` is read as the notebook's type asks, so that a str stays as it is written.

    Raises:
        ConfigError: The text is no YAML mapping, or `check` finds something.
    """
    kinds = {name: parameter.kind for name, parameter in known(notebook).items()}
    given = parse(text, "-y") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"-y: {text!r} is not a mapping of names to values")
    given |= {name: value if kinds.get(name) is str else parse(value, f"-p {name}") for name, value in pairs}
    check(notebook, given)
    return given


def check(notebook: Path, parameters: dict) -> None:
    """Raise ConfigError for parameters that a notebook cannot be run with, as far as that shows without running it."""
    expected = known(notebook)
    check_known(parameters, expected, notebook.name, "parameter")
    for name, value in parameters.items():
        if not fits(value, kind := expected[name].kind):
            raise ConfigError(f"{notebook.name}: {name}: {value!r} is a {type(value).__name__}, not {kind.__name__}")
    values = values_of(notebook, parameters)
    if values.get("config") not in (None, "", "auto"):
        load_config(values["config"], values.get("overrides"), parts=False)
    if values.get("options") and notebook.stem in OPTIONS:
        module, reader = OPTIONS[notebook.stem]
        getattr(importlib.import_module(module), reader)(values["options"])
    if (run := values.get("run")) and not values.get("embeddings") and not (resolve(run) / "metrics.json").is_file():
        raise ConfigError(f"run: {run} holds no finished run; 02_train makes one, or goes on with it")


def output_of(notebook: Path, parameters: dict) -> Path:
    """Return where an executed notebook goes by default: into the folder that the notebook writes to."""
    values, name = values_of(notebook, parameters), re.sub(r"^\d+_", "", notebook.stem)
    if "run_dir" in values:
        return training_of(values)[0] / f"{name}.ipynb"
    return resolve(values.get("out_dir") or values.get("run") or f"runs/{name}") / f"{name}.ipynb"


def training_of(values: dict) -> tuple[Path, int]:
    """Return the run folder and the number of epochs of the training that parameters of 02_train ask for."""
    settings = load_config(values["config"], values["overrides"], parts=False)["Global"]
    folder = values["run_dir"] or settings["output_dir"] or f"runs/{Path(values['config']).stem}"
    return resolve(folder), settings["epochs"]


def execute(notebook: Path, output: str | Path, parameters: dict) -> None:
    """Run a notebook with checked parameters; a training prints a line an epoch.

    Args:
        notebook: the notebook.
        output: the file of the executed notebook, whose folder is made.
        parameters: its parameters.

    Raises:
        ConfigError: The notebook refuses its config or its folder, and there was no earlier result; nothing is left.
        FailedError: A cell has ended with an error, or the kernel has ended.
    """
    import papermill  # seconds, which a mistake need not wait for
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it prints what a cell raised while the kernel was ended
    output, values = Path(output), values_of(notebook, parameters)
    if output.suffix != ".ipynb":
        raise ConfigError(f"--to {output}: is not the name of a notebook, NAME.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    earlier = output.read_bytes() if output.is_file() else None
    try:
        with epochs_shown(*training_of(values)) if "run_dir" in values else nullcontext():
            papermill.execute_notebook(
                str(notebook),
                str(output),
                parameters,
                kernel_name="python3",
                language="python",
                cwd=str(Path.cwd()),
                progress_bar=False,
                autosave_cell_every=30,
                extra_arguments=KERNEL,
            )
    except papermill.PapermillExecutionError as error:
        if earlier is not None and error.ename in REFUSALS:  # a result stays as it was
            output.write_bytes(earlier)
            raise FailedError(error.evalue) from None
        if error.ename in ("ConfigError", "LockedError"):
            output.unlink(missing_ok=True)
            with suppress(OSError):  # other files are there
                output.parent.rmdir()
            raise ConfigError(error.evalue) from None
        name = "" if error.ename in OWN else f"{error.ename}: "
        raise FailedError(f"{name}{error.evalue}\n  see {output}") from None
    except OSError as error:
        raise FailedError(
            f"{output}: cannot be written ({error.strerror or error}); make room, or choose another --to"
        ) from None
    except (DeadKernelError, KeyboardInterrupt):
        raise FailedError(
            f"{output}: stopped, as its kernel has ended; a training goes on from its last checkpoint"
        ) from None
