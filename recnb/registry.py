"""Registries: the names that a YAML file may use, each with the constructor that it stands for.

A section such as `{name: ArcMargin, margin: 0.15}` is one object: `name` picks it from a registry and the other keys
are its constructor's arguments. Each module registers its own parts. A name or argument that does not exist is a
ConfigError of one sentence that names its place.
"""

import difflib
import inspect
import operator
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Literal


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the place and what would mend it."""

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # a file may have bytes that are no text


def is_own(error: BaseException | type[BaseException]) -> bool:
    """Return whether an error, or its class, is recnb's own, with a message for users."""
    return (error if isinstance(error, type) else type(error)).__module__.partition(".")[0] == "recnb"


def suggest(word: str, known: typing.Iterable[str]) -> str:
    """Return half a sentence that offers the nearest known spelling, or lists what there is."""
    known = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    folded = [k for k in known if k.lower() == str(word).lower()]
    if folded or near:
        return f"did you mean '{(folded or near)[0]}'?"
    return f"there is {', '.join(known)}" if known else "there is none"


def check_known(words: typing.Iterable[str], known: typing.Collection[str], where: str, kind: str = "") -> None:
    """Raise ConfigError for the first word that is not known.

    Args:
        words: The words to check.
        known: What they may be.
        where: Their place in the file.
        kind: What they name, for the message.
    """
    for word in words:
        if word not in known:
            named = f"{kind} '{word}'".lstrip()
            raise ConfigError(f"{where}: there is no {named}; {suggest(word, known)}")


@dataclass(frozen=True)
class Range:
    """The bounds of a number in an annotation, `Annotated[int, Range(1)]`; `above` and `below` are excluded."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float | None) -> str | None:
        """Return what is wrong with a number, as half a sentence, or None."""
        bounds = (
            (operator.lt, self.least, "small; the least is"),
            (operator.gt, self.most, "large; the most is"),
            (operator.le, self.above, "small; it has to be above"),
            (operator.ge, self.below, "large; it has to be below"),
        )
        for outside, bound, words in bounds:
            if value is not None and bound is not None and outside(value, bound):
                return f"{value} is too {words} {bound:,}"
        return None

    def __str__(self) -> str:
        words = {"from": self.least, "above": self.above, "up to": self.most, "below": self.below}
        return " ".join(f"{word} {bound:,}" for word, bound in words.items() if bound is not None)


Count = Annotated[int, Range(1, 10**9)]
Natural = Annotated[int, Range(0, 2**63 - 1)]
Side = Annotated[int, Range(1, 16_384)]  # pixels
Rate = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]

ACCEPTED: dict[typing.Any, type | tuple[type, ...]] = {
    float: (int, float),
    int: int,
    bool: bool,
    str: str,
    list: list,
    tuple: (list, tuple),
    dict: dict,
    type(None): type(None),
}


def problem(value, hint, wants: str = "not") -> str | None:
    """Return why a value from YAML does not fit an annotation, as half a sentence, or None where it fits.

    Args:
        value: A plain value.
        hint: The annotation; any value fits a type that YAML cannot express.
        wants: The words before the type, such as `ArcMargin wants`.
    """
    if isinstance(hint, str) or hint in (typing.Any, inspect.Parameter.empty):
        return None
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    mistyped = f"{value!r} is a {type(value).__name__}, {wants} "
    if origin is Annotated:
        limits = (limit.problem(value) for limit in inner[1:] if isinstance(limit, Range))
        return problem(value, inner[0], wants) or next(filter(None, limits), None)
    if origin is Literal:
        return None if value in inner else f"'{value}' is not supported; {suggest(value, map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        found = {option: problem(value, option, wants) for option in inner}
        near = (text for option, text in found.items() if text != mistyped + written(option))
        return None if None in found.values() else next(near, mistyped + written(hint))
    if (origin in (int, float) and isinstance(value, bool)) or not isinstance(value, ACCEPTED.get(origin, object)):
        return mistyped + written(hint)
    if isinstance(value, list | tuple) and origin in (list, tuple) and inner:
        return next(filter(None, (problem(item, inner[0], wants) for item in value)), None)
    return None


def fits(value, hint) -> bool:
    """Return whether a value from YAML fits an annotation."""
    return problem(value, hint) is None


def written(hint, bounds: bool = False) -> str:
    """Return an annotation as text, with the bounds of types in brackets or without them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = f" ({', '.join(map(str, inner[1:]))})" if bounds else ""
        return written(inner[0], bounds) + limits
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(written(option, bounds) for option in inner)
    if origin in (list, tuple, dict):
        return f"{origin.__name__}[{', '.join(written(option, bounds) for option in inner)}]"
    return "None" if hint is type(None) else inspect.formatannotation(hint)


def check_values(section: dict, hints: dict[str, typing.Any], where: str, wants: str = "not") -> None:
    """Raise ConfigError for the first value of a section that does not fit its annotation.

    Args:
        section: The section.
        hints: Keys with their annotations.
        where: The section's place in the file.
        wants: The words before the type, as for `problem`.
    """
    for key, value in section.items():
        if key in hints and (text := problem(value, hints[key], wants)):
            raise ConfigError(f"{where}.{key}: {text}".lstrip("."))


class Registry(dict):
    """Constructors by the names that a YAML file uses, which are their own."""

    def __init__(self, kind: str, beside: dict[str, typing.Any] | None = None):
        """Make an empty registry.

        Args:
            kind: What its parts are, for messages.
            beside: Keys of a section that are not arguments of the part, and what their values must be.
        """
        super().__init__()
        self.kind, self.beside = kind, beside or {}

    def register(self, part):
        """Register a part under its own name and return it: a decorator."""
        self[part.__name__] = part
        return part

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the parameters of a part; none where it takes `*args`, as a module without its own constructor."""
        found = {k: p for k, p in inspect.signature(self[name]).parameters.items() if k != "self"}
        return {} if any(p.kind is p.VAR_POSITIONAL for p in found.values()) else found

    def hints(self, name: str) -> dict[str, typing.Any]:
        """Return the keys of a section of this name, each with its annotation."""
        part = self[name].__init__ if inspect.isclass(self[name]) else self[name]
        known = typing.get_type_hints(part, include_extras=True)
        hints = {k: known.get(k, typing.Any) for k, p in self.parameters(name).items() if p.kind is not p.VAR_KEYWORD}
        return {**hints, **self.beside}

    def check(self, section, where: str) -> None:
        """Raise ConfigError for an unknown name or argument, or a value that does not fit."""
        if not isinstance(section, dict) or section.get("name") is None:
            raise ConfigError(f"{where}: holds {section!r}, not a mapping with a 'name'; {suggest('', self)}")
        name = section["name"]
        if not isinstance(name, str) or name not in self:
            raise ConfigError(f"{where}: there is no {self.kind} '{name}'; {suggest(name, self)}")
        hints, args = self.hints(name), {k: v for k, v in section.items() if k != "name"}
        checks_the_rest = any(p.kind is p.VAR_KEYWORD for p in self.parameters(name).values())
        for key in (key for key in args if key not in hints and not checks_the_rest):
            raise ConfigError(f"{where}.{key}: {name} has no such argument; {suggest(key, hints)}")
        check_values(args, hints, where, f"{name} wants")

    def build(self, section: dict, where: str, **known):
        """Return the object that a section describes.

        Args:
            section: Its `name`, and arguments of the part.
            where: Its place in the file.
            known: What only the run can tell, as `argument=(value, words that say where it comes from)`: supplied where
                the section leaves the argument out, compared where it gives it.

        Raises:
            ConfigError: The section cannot be meant, or contradicts what is known.
        """
        self.check(section, where)
        name, args = section["name"], {k: v for k, v in section.items() if k != "name" and k not in self.beside}
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
                raise  # torch refuses sizes with RuntimeError itself; its subclasses are other errors
            raise ConfigError(f"{where}: {error}") from error


def entry(item, where: str, named: bool = False) -> tuple[str, str, dict]:
    """Return place, name and arguments of one `- Name: {arguments}`.

    Args:
        item: The entry of a list.
        where: Its place in the file.
        named: Whether the arguments may have a 'name' too.

    Raises:
        ConfigError: The entry has another form.
    """
    pairs = list(item.items()) if isinstance(item, dict) else []
    if len(pairs) != 1 or not isinstance(pairs[0][1], dict | None) or (not named and "name" in (pairs[0][1] or {})):
        raise ConfigError(f"{where}: {item!r} is not of the form '- Name: {{arguments}}'")
    name, args = pairs[0]
    return f"{where}.{name}", name, args or {}
