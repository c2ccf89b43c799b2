"""The pages that are made from the code: the config reference from the registries, the API, the size of the folders."""

import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from size import sizes

import recnb
from recnb.recipe import settings
from recnb.recipe.parts import SLOTS
from recnb.registry import Registry, written

PAGES = {  # page: (its title, the kinds of parts on it)
    "data": ("Data", ("dataset", "transform", "batch transform", "sampler")),
    "model": ("Model", ("neck", "head")),
    "loss": ("Losses", ("loss",)),
    "optimizer": ("Optimizers and schedules", ("optimizer", "regularizer", "learning-rate schedule")),
    "evaluation": ("Metrics and post-processing", ("metric", "post-processing step")),
}
SETTINGS = {  # the sections that are no constructor calls
    settings.Global: "Global",
    settings.Amp: "AMP",
    settings.Ema: "EMA",
    settings.Retention: "Retention",
    settings.Ladder: "Ladder",
    settings.Loader: "DataLoader.*.loader",
    settings.HeldOut: "DataLoader.Validation",
}
SUPPLIED = ("class_num", "in_channels", "embedding_size", "num_features")  # the run knows them


def modules() -> dict:
    """Every module of the package by its name."""
    names = [found.name for found in pkgutil.walk_packages(recnb.__path__, "recnb.")]
    return {name: importlib.import_module(name) for name in names if not name.endswith("__main__")}


def registries() -> dict[str, Registry]:
    """Every registry by the kind of its parts."""
    return {registry.kind: registry for registry in SLOTS.values()}


def slots(registry: Registry) -> str:
    """The places of a file where a registry's names stand, as code."""
    return ", ".join(f"`{slot}`" for slot, parts in SLOTS.items() if parts is registry)


def write_pages(docs: Path) -> None:
    """Write the generated pages below a folder, and leave those alone that have not changed."""
    pages = {"_generated/size.txt": size_table(), **reference_pages(), **api_pages()}
    for name, text in pages.items():
        path = docs / name
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for folder in ("reference", "api"):
        for path in (docs / folder).glob("*.md"):
            if f"{folder}/{path.name}" not in pages:
                path.unlink()


def size_table() -> str:
    """The size of each folder as a Markdown table."""
    lines = sizes(lines=True)
    rows = [f"| {name} | {count:,} | {lines[name]:,} |" for name, count in sizes().items()]
    return "\n".join(["| folder | statements | lines |", "|---|---:|---:|", *rows]) + "\n"


# ---- the config reference --------------------------------------------------------------------------------------------


def reference_pages() -> dict[str, str]:
    """The pages of the config reference by file name."""
    parts = registries()
    kinds = [kind for _, kinds in PAGES.values() for kind in kinds]
    if set(kinds) != set(parts):
        raise ValueError(f"docs/generate.py: PAGES has {sorted(kinds)}, the package has {sorted(parts)}")
    rows = [
        f"| [{title}]({page}.md) | {', '.join(slots(parts[kind]) for kind in kinds)} |"
        for page, (title, kinds) in PAGES.items()
    ]
    index = [
        "# Config reference",
        "",
        "Made from the code: every name that a config may use, with its arguments and "
        "defaults. [Configs](../config.md) explains the sections.",
        "",
        "| page | sections |",
        "|---|---|",
        f"| [Settings](settings.md) | {', '.join(f'`{place}`' for place in SETTINGS.values())} |",
        *rows,
        "",
        "```{toctree}",
        ":hidden:",
        "",
        "settings",
        *PAGES,
        "```",
    ]
    pages = {
        page: "\n".join([f"# {title}", "", *(line for kind in kinds for line in section(parts[kind]))])
        for page, (title, kinds) in PAGES.items()
    }
    pages |= {"index": "\n".join(index), "settings": settings_page()}
    return {f"reference/{page}.md": text + "\n" for page, text in pages.items()}


def section(registry: Registry) -> list[str]:
    """The lines about the parts of one registry."""
    title = {"batch transform": "Batch transforms", "learning-rate schedule": "Learning-rate schedule"}.get(
        registry.kind, registry.kind.capitalize()
    )
    lines = [f"## {title}", "", f"Where: {slots(registry)}.", ""]
    if registry.beside:
        keys = ", ".join(f"`{key}` ({kind_of(kind)})" for key, kind in registry.beside.items())
        lines += [f"Each of them also takes {keys}.", ""]
    for (text, _), names in alike(registry).items():
        title = names[0] if len(names) == 1 else f"{names[0]} and others"
        same = ", ".join(f"`{name}`" for name in names[1:])
        others = [f"In the same way: {same}.", ""] if same else []
        lines += [f"### {title}", "", text.replace("{name}", names[0]), "", *others, *arguments(registry, names[0])]
    return lines


def alike(registry: Registry) -> dict[tuple[str, str], list[str]]:
    """The names of a registry, those together that differ in nothing but the name: {(summary, arguments): names}."""
    groups = defaultdict(list)
    for name, part in registry.items():
        summary = plain(first_paragraph(part)).replace(name, "{name}")
        groups[summary, str([*registry.parameters(name).values()])].append(name)
    return groups


def first_paragraph(part) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(part) or "").split("\n\n")[0].split())


def plain(text: str) -> str:
    """Text in which Markdown sees no emphasis and no table outside of code; addresses become links."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"(?<!<)(https?://[^\s),]+)", r"<\1>", re.sub(r"([*|\[\]{}]|\b_|_\b)", r"\\\1", part))
        for part in parts[::2]
    ]
    return "".join(parts).replace(r"\{name\}", "{name}")


def arguments(registry: Registry, name: str) -> list[str]:
    """The table of a part's arguments, with what its docstring says about them, if it does."""
    rows, said, hints = [], described(registry[name]), registry.hints(name)
    for key, parameter in registry.parameters(name).items():
        if parameter.kind is parameter.VAR_KEYWORD:
            rows.append(("others", "", "", said.get(key, "")))
            continue
        default = (
            f"`{parameter.default!r}`"
            if parameter.default is not parameter.empty
            else ("from the run" if key in SUPPLIED else "required")
        )
        rows.append((f"`{key}`", kind_of(hints[key]), cell(default), said.get(key, "")))
    if not rows:
        return ["No arguments.", ""]
    width = 4 if said else 3
    head = [("argument", "type", "default", "meaning"), ("---",) * 4]
    return [*(f"| {' | '.join(row[:width])} |" for row in (*head, *rows)), ""]


def kind_of(hint) -> str:
    """An annotation as code in a table's cell."""
    return "" if hint is Any else cell(f"`{written(hint, bounds=True)}`")


def cell(text: str) -> str:
    """Text that a table can hold."""
    return text.replace("|", r"\|")


def described(part) -> dict[str, str]:
    """What the Args section of a docstring says, by argument; of a class, its own or its constructor's."""
    texts = [inspect.getdoc(part) or "", inspect.getdoc(getattr(part, "__init__", None)) or ""]
    found = {}
    for text in texts:
        block = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
        for key, meaning in re.findall(
            r"^ {4}\*{0,2}(\w+)(?: \([^)]*\))?: ((?:.*)(?:\n {5,}.*)*)", block[1] if block else "", re.MULTILINE
        ):
            found.setdefault(key, cell(plain(" ".join(meaning.split()))).replace(r"\\|", r"\|"))
    return found


def settings_page() -> str:
    """The page of the sections that are no part's constructor call."""
    ignored = ", ".join(f"`{key}`" for key in settings.WITHOUT_EFFECT)
    lines = ["# Settings", ""]
    for kind, place in SETTINGS.items():
        said, hints, defaults = described(kind), settings.hints(kind), settings.defaults(kind)
        lines += [f"## {place.split('.')[-1]}", "", f"Where: `{place}`.", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key}` | {kind_of(hint)} | {cell(f'`{defaults[key]!r}`')} | {said[key]} |"
            for key, hint in hints.items()
        ]
        lines += [""]
    return "\n".join([*lines, f"Accepted in `Global` for PaddleClas's sake, without effect: {ignored}."])


# ---- the API ---------------------------------------------------------------------------------------------------------


def api_pages() -> dict[str, str]:
    """A page for each folder of the package, and one for the modules beside them, by file name."""
    folders = defaultdict(list)
    for name, module in modules().items():
        is_folder = hasattr(module, "__path__")
        folders[name.split(".")[1] if is_folder or name.count(".") > 1 else "modules"].append(name)
    rows, pages = [], {}
    for folder, names in folders.items():
        title = "Other modules" if folder == "modules" else f"recnb.{folder}"
        question = "" if folder == "modules" else first_paragraph(importlib.import_module(f"recnb.{folder}"))
        rows.append(f"| [{title}]({folder}.md) | {plain(question)} |")
        parts = [line for name in names for line in api_of(name, name == f"recnb.{folder}")]
        pages[f"api/{folder}.md"] = "\n".join([f"# {title}", "", *parts])
    index = [
        "# API",
        "",
        "Made from the docstrings, a page for each folder of the package.",
        "",
        "| folder | what it is for |",
        "|---|---|",
        *rows,
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *folders,
        "```",
        "",
    ]
    return {"api/index.md": "\n".join(index), **pages}


def api_of(name: str, is_page: bool) -> list[str]:
    """The lines that document one module; the folder itself has its name in the page's title already."""
    title = [] if is_page else [f"## {name.removeprefix('recnb.')}", ""]
    return [*title, "```{eval-rst}", f".. automodule:: {name}", *([] if is_page else ["   :members:"]), "```", ""]


SECTIONS = re.compile(r"(Args|Arguments|Attributes|Raises|Returns|Yields|References|Notes?|Examples?|Warns|See Also):$")


def as_rst(app, what, name, obj, options, lines) -> None:
    """Turn a docstring, in place, from plain text with `code` into reStructuredText; napoleon reads its sections."""
    text = re.sub(rf"\n(?={SECTIONS.pattern})", "\n\n", "\n".join(lines).strip("\n"), flags=re.MULTILINE)
    lines[:] = [*"\n\n".join(map(paragraph_as_rst, text.split("\n\n"))).split("\n"), ""]


def paragraph_as_rst(text: str) -> str:
    """A paragraph with its code marked; what is indented, or a table of its own, is shown as it stands."""
    lines = text.split("\n")
    if not SECTIONS.match(lines[0]) and any(line.startswith("    ") for line in lines):
        whole = all(line.startswith("    ") for line in lines)
        return "::\n\n" + (text if whole else "\n".join(f"    {line}" for line in lines))
    parts = re.split(r"(`+[^`]+`+)", text)
    parts[::2] = [re.sub(r"(\\|\*|\||(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(parts)
