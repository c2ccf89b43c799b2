"""A YAML file becomes plain values, whoever wrote it: nothing is built or run, and nothing can fill the memory.

Tags that would build objects, anchors that contain themselves, aliases that multiply, and files that are too large or
too deeply nested are each refused in a sentence, before any value is made.
"""

import contextlib
import re
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import yaml

from recnb.registry import ConfigError, suggest
from recnb.storage import resolve

LARGEST, VALUES, DEEPEST = 500_000, 100_000, 50  # bytes, values and levels of a file; no configuration comes near


class Loader(yaml.SafeLoader):
    """Reads plain values by YAML 1.2: `1e-3` and `0o17` are numbers, `yes` and `1:30:00` are text.

    A key given twice is an error.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_document(self, node: yaml.Node):
        """Return the values of a document that `measure` does not refuse."""
        measure(node)
        return super().construct_document(node)


class Dumper(yaml.SafeDumper):
    """Writes no anchors and quotes text that YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data) -> bool:
        """Return True: no value is an alias of another."""
        return True


NUMBERS = {  # of YAML 1.2, by the kind
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
WORDS = {"bool": r"true|True|TRUE|false|False|FALSE", "null": r"~|null|Null|NULL|", "merge": r"<<"}
for kind, pattern in {**NUMBERS, **WORDS}.items():
    for reader in (Loader, Dumper) if kind in NUMBERS else (Loader,):
        reader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), None)


def whole_number(loader: Loader, node: yaml.ScalarNode) -> int:
    """Return the number of a YAML scalar: octal after 0o, hexadecimal after 0x, otherwise decimal."""
    return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


Loader.add_constructor("tag:yaml.org,2002:int", whole_number)


def mapping(loader: Loader, node: yaml.MappingNode) -> dict:
    """Return the dict of a YAML mapping; raise ConstructorError where a key is given twice."""
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)


def measure(node: yaml.Node, above: tuple[int, ...] = (), known: dict | None = None) -> tuple[int, int]:
    """Return how many values and levels a YAML node has once its aliases are written out.

    Args:
        node: The node; a text counts as a value for each 100 characters. A merged mapping counts as one that is nested.
        above: The ids of the nodes that it is in.
        known: What has been measured, by the ids of the nodes.

    Raises:
        ConstructorError: The node has too many of either, or contains itself.
    """
    known = {} if known is None else known
    if id(node) in above:
        raise refused(node, "an anchor contains itself")
    if id(node) not in known:
        inner = (
            []
            if isinstance(node, yaml.ScalarNode)
            else chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in node.value)
        )
        parts = [measure(value, (*above, id(node)), known) for value in inner]
        own = 1 + len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 1
        known[id(node)] = own + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
    size, depth = known[id(node)]
    if size > VALUES:
        raise refused(
            node, f"with its aliases written out, it has more than {VALUES:,} values, which no configuration needs"
        )
    if len(above) + depth > DEEPEST:
        raise refused(node, f"it has more than {DEEPEST} levels, one in another, which no configuration needs")
    return size, depth


def refused(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    """Return the error for a node that is refused."""
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def parse(text: str, source: str | Path) -> object:
    """Return the plain values of YAML text; raise ConfigError, with the source and the line, for anything else."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except RecursionError:
        raise ConfigError(f"{source}: more than {DEEPEST} levels, one in another") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if "could not determine a constructor" in problem:
            problem = f"{problem.split(' for ')[-1]} would build an object, and only plain values are allowed here"
        raise ConfigError(f"{source}{f' line {mark.line + 1}' if mark else ''}: {problem}") from None


def read_text(path: Path) -> str:
    """Return the text of a file; raise OSError or ValueError where it is none, or too large for a configuration."""
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for ever
        raise ValueError("is a pipe or a device, not a file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"is larger than {LARGEST:,} bytes, which no configuration needs")
    return data.decode("utf-8-sig")


def read_yaml(path: str | Path) -> dict:
    """Return the mapping in a YAML file; raise ConfigError, with file and line, where there is none."""
    path = resolve(path)
    try:
        text = read_text(path)
    except FileNotFoundError:
        here = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: there is no such file; {suggest(path.name, here)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    content = parse(text, path)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}, not a mapping of sections such as 'Global:' and 'Arch:'"
        )
    return content


def as_yaml(cfg: dict) -> str:
    """Return a configuration as YAML text: short sections on one line, the order kept, no anchors."""
    return yaml.dump(cfg, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=110)


def plain_number(value, like):
    """Return the number that a text spells where it replaces one (papermill gives `1e-3` as text), else the value."""
    if isinstance(value, str) and isinstance(like, (int, float)) and not isinstance(like, bool):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value


def step_into(entries: list, step: str, where: str) -> tuple[Any, Any]:
    """Return the container and the key in it that a step of a dotted key means in a list of entries.

    Args:
        entries: The list.
        step: A number from 0 in ASCII digits, or the name of an entry `{name: arguments}` that the list has once.
        where: The place of the list, for messages.

    Raises:
        ConfigError: The list has no such entry, or several.
    """
    names = [next(iter(entry), None) if isinstance(entry, dict) else None for entry in entries]
    if step.isascii() and step.isdecimal() and int(step) < len(entries):
        return entries, int(step)
    if names.count(step) == 1:
        return entries[names.index(step)], step
    if step in names:
        raise ConfigError(f"{where} has {names.count(step)} entries '{step}'; give the number of one, counted from 0")
    raise ConfigError(f"{where} has no entry '{step}'; {suggest(step, filter(None, names))}")


def override(cfg: dict, key: str, value) -> None:
    """Set the value of a dotted key in place.

    Args:
        cfg: The configuration.
        key: The steps to the value, with dots between; a step into a list is as `step_into` takes it.
        value: What is set; a text that spells a number where it replaces one is that number.

    Raises:
        ConfigError: There is nothing above the value.
    """
    node: Any = cfg
    steps = str(key).split(".")
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(node, list):
            node, step = step_into(node, step, f"override '{key}': '{'.'.join(steps[:depth])}'")
        elif not isinstance(node, dict) or (step not in node and not last):
            known = node if isinstance(node, dict) else ()
            raise ConfigError(f"override '{key}': there is no '{'.'.join(steps[: depth + 1])}'; {suggest(step, known)}")
        if last:
            node[step] = plain_number(value, node.get(step) if isinstance(node, dict) else node[step])
        else:
            node = node[step]


def unshared(node):
    """Return a copy in which no parts are shared: an override would change every place that shares a YAML alias."""
    if isinstance(node, dict):
        return {key: unshared(value) for key, value in node.items()}
    return [unshared(value) for value in node] if isinstance(node, list | tuple) else node
