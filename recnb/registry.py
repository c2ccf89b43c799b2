"""Registries: the names that a YAML file may use, each with the constructor that it stands for.

A section such as `{name: ArcMargin, margin: 0.15}` is one object: `name` picks it from a registry and the other keys
are its constructor's arguments. Each chapter fills the registries of its own parts, so that what can be written in a
file is what exists, and every misspelling ends in one sentence that names the place.
"""

from __future__ import annotations

import difflib
import inspect
import typing


class ConfigError(ValueError):
    """A configuration that cannot mean what it says; the message names the place and what would mend it."""

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # a file may hold what is no text


def suggest(word: str, known: typing.Iterable[str]) -> str:
    """A half sentence that offers the nearest known spelling, or lists what there is."""
    known = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    folded = [k for k in known if k.lower() == str(word).lower()]
    if folded or near:
        return f"did you mean '{(folded or near)[0]}'?"
    return f"there is {', '.join(known)}" if known else "there is none"


def fits(value, hint) -> bool:
    """Whether a value from YAML can be what an annotation asks for; annotations that YAML cannot express always fit."""
    if isinstance(hint, str) or hint in (typing.Any, inspect.Parameter.empty):
        return True
    if typing.get_args(hint) and typing.get_origin(hint) not in (list, tuple, dict):
        return any(fits(value, option) for option in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind in (int, float) and isinstance(value, bool):
        return False
    accepted = {
        float: (int, float),
        int: int,
        bool: bool,
        str: str,
        list: list,
        tuple: (list, tuple),
        dict: dict,
        type(None): type(None),
    }
    return kind not in accepted or isinstance(value, accepted[kind])


class Registry(dict):
    """Constructors by the name that a YAML file uses; the name is the class's or function's own."""

    made: typing.ClassVar[list[Registry]] = []

    def __init__(self, kind: str, *slots: str, beside: dict[str, type] | None = None):
        """`slots`: the places of a file where these parts are named (`*`: each loader, `[]`: a list of them);
        `beside`: keys of such a section that are not arguments of the part, and what their values must be."""
        super().__init__()
        self.kind, self.slots, self.beside = kind, slots, beside or {}
        self.made.append(self)

    def register(self, part):
        """The part itself, now known by its own name: use as a decorator."""
        self[part.__name__] = part
        return part

    def arguments(self, section: dict) -> dict:
        """The keys of a section that go to the constructor."""
        return {k: v for k, v in section.items() if k != "name" and k not in self.beside}

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        return {k: p for k, p in inspect.signature(self[name]).parameters.items() if k != "self"}

    def check(self, section, where: str) -> None:
        """Raise ConfigError for an unknown name or argument, or a value of the wrong kind."""
        if not isinstance(section, dict) or section.get("name") is None:
            raise ConfigError(f"{where}: holds {section!r}, not a mapping with a 'name'; {suggest('', self)}")
        name = section["name"]
        if not isinstance(name, str) or name not in self:
            raise ConfigError(f"{where}: there is no {self.kind} '{name}'; {suggest(name, self)}")
        part = self[name].__init__ if inspect.isclass(self[name]) else self[name]
        hints = {**dict.fromkeys(self.parameters(name), typing.Any), **typing.get_type_hints(part), **self.beside}
        hints.pop("return", None)
        free = [k for k, p in self.parameters(name).items() if p.kind is p.VAR_KEYWORD]  # the part checks the rest
        for key in free:
            hints.pop(key)
        for key, value in ((k, v) for k, v in section.items() if k != "name" and (k in hints or not free)):
            if key not in hints:
                raise ConfigError(f"{where}.{key}: {name} has no such argument; {suggest(key, hints)}")
            if not fits(value, hints[key]):
                raise ConfigError(
                    f"{where}.{key}: {value!r} is a {type(value).__name__}, "
                    f"{name} wants {inspect.formatannotation(hints[key])}"
                )

    def build(self, section: dict, where: str, **known):
        """The object that a section describes.

        `known` holds what only the run can tell, as `argument=(value, where it comes from)`: it is supplied when the
        section leaves the argument out, and compared when the section gives it. Raises ConfigError on a conflict.
        """
        self.check(section, where)
        name, args = section["name"], self.arguments(section)
        parameters = self.parameters(name)
        for key, (value, source) in known.items():
            if key in args and not source:
                raise ConfigError(f"{where}.{key}: comes from the data, and the file cannot say otherwise")
            if key in args and args[key] != value:
                raise ConfigError(f"{where}.{key} is {args[key]}, but {source} {value}")
            if key in parameters:
                args[key] = value
        missing = [
            k for k, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and k not in args
        ]
        if missing:
            raise ConfigError(f"{where}: {name} needs a value for '{missing[0]}'")
        try:
            return self[name](**args)
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
                raise  # torch refuses sizes with the bare class; others say something else
            raise ConfigError(f"{where}: {error}") from error


def entry(item, where: str, named: bool = False) -> tuple[str, str, dict]:
    """(place, name, arguments) of one `- Name: {arguments}`; raises ConfigError for anything else."""
    pairs = list(item.items()) if isinstance(item, dict) else []
    if len(pairs) != 1 or not isinstance(pairs[0][1], dict | None) or (not named and "name" in (pairs[0][1] or {})):
        raise ConfigError(f"{where}: {item!r} is not of the form '- Name: {{arguments}}'")
    name, args = pairs[0]
    return f"{where}.{name}", name, args or {}
