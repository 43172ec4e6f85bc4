"""Typed parameters: a stage declares a dataclass, params.yaml gives every value, mistakes get a clear error.

params.yaml holds what defines a result. A key that no stage knows, a key left out, or a value of the wrong
type or range stops the stage before it computes anything.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import MISSING, Field, asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rankwise.types import UserError
from tasks import yaml_text

T = TypeVar("T")
_ABSENT = object()  # a key that is left alone; null is a value


def param(default: Any, doc: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Any:
    """A parameter: its value on the embedded default, one line for people, and its bounds.

    The default here is what `params.yaml` ships with and what a recipe starts from; a stage never falls
    back on it.
    """
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def load(path: Path, section: str, params_type: type[T]) -> T:
    """Read one section of a params file into its dataclass.

    Raises UserError that names the file, the key and the mend.
    """
    document = read_yaml(path)
    if section not in document:
        raise UserError(
            f"{path}: section {section!r} is missing{_near(section, document)}; add it, or copy it from git"
        )
    return build(params_type, document[section], where=f"{path}: {section}")


def read_yaml(path: Path) -> dict:
    """A YAML mapping from a file; raises UserError with the line where it breaks."""
    document = yaml_text.read(path, missing="run from the project's root or name one with --params")
    if not isinstance(document, dict):
        raise UserError(f"{path}: a mapping of sections was expected, found {type(document).__name__}")
    return document


def read_entry(address: str) -> dict[str, Any]:
    """An entry of a YAML file, named as FILE:KEY.KEY: parameters that stand over those of params.yaml.

    Raises UserError that names the file and the keys that it has.
    """
    path, _, dotted = address.rpartition(":")
    if not path or not dotted:
        raise UserError(f"--over {address}: FILE:ENTRY was expected, such as sweeps/params.yaml:policies.NAME")
    entry: Any = read_yaml(Path(path))
    for key in dotted.split("."):
        if not isinstance(entry, dict) or key not in entry:
            known = entry if isinstance(entry, dict) else ()
            raise UserError(f"--over {address}: {path} has no {key!r} there{_near(key, known)}")
        entry = entry[key]
    if not isinstance(entry, dict):
        raise UserError(f"--over {address}: a mapping of sections was expected, found {_cut(entry)}")
    return entry


def build(params_type: type[T], given: object, *, where: str) -> T:
    """Check a mapping against a dataclass, key by key, and make it.

    Raises UserError on an unknown key (with the nearest known one), a missing key, a wrong type or range.
    """
    if not isinstance(given, dict):
        raise UserError(f"{where}: a mapping was expected, found {_cut(given)}")
    known = {f.name: f for f in fields(params_type)}
    for key in given:
        if key not in known:
            raise UserError(f"{where}.{_key(key)}: no such parameter{_near(key, known)} (known: {', '.join(known)})")
    hints = typing.get_type_hints(params_type)
    values = {}
    for name, spec in known.items():
        if name not in given:
            raise UserError(
                f"{where}.{name}: missing; add `{name}: {_show(default_of(spec))}`  # {spec.metadata['doc']}"
            )
        values[name] = _check(hints[name], given[name], spec, where=f"{where}.{name}")
    return params_type(**values)


def merged(default: Any, overlay: Any) -> Any:
    """A params dataclass with a recipe's values over it, as plain values: sections merge, anything else is replaced."""
    if not is_dataclass(default) or not isinstance(overlay, dict):
        return _plain(default) if overlay is _ABSENT else overlay
    hints, own = typing.get_type_hints(type(default)), {}
    for spec in fields(default):
        value, given = getattr(default, spec.name), overlay.get(spec.name, _ABSENT)
        if value is None and isinstance(given, dict) and (section := section_of(hints[spec.name])):
            value = section()  # null by default: the values go over the section's own
        own[spec.name] = merged(value, given)
    return {**own, **{key: value for key, value in overlay.items() if key not in own}}


def below(folder: Path, name: str, *, where: str) -> Path:
    """The path of a file or folder that a parameter names below a folder; links in that folder may lead elsewhere.

    Raises UserError for a name that leads out of it by itself.
    """
    absolute = Path(name).is_absolute()
    if absolute or ".." in Path(name).parts:
        raise UserError(
            f"{where}: {name} {'is absolute' if absolute else 'leads out of it'}, so DVC could not see it change; "
            f"link or copy it into {folder} and give its path from there"
        )
    return folder / name


def default_of(spec: Field) -> Any:
    """The default of one declared parameter."""
    return spec.default if spec.default is not MISSING else spec.default_factory()


def section_of(hint: Any) -> type | None:
    """The dataclass of a parameter that is a section, or a section or null; None of any other."""
    return next((option for option in (hint, *typing.get_args(hint)) if is_dataclass(option)), None)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {spec.name: _plain(getattr(value, spec.name)) for spec in fields(value)}
    return value


def _check(hint: Any, value: Any, spec: Field, *, where: str) -> Any:
    if (section := section_of(hint)) is not None:
        return None if value is None and not is_dataclass(hint) else build(section, value, where=where)
    if not _fits(hint, value):
        raise UserError(f"{where}: {_spell(hint)} was expected, found {_cut(value)}{_exponent_hint(hint, value)}")
    if hint is float and isinstance(value, int):
        value = float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(value, spec, where=where)
    return value


def _fits(hint: Any, value: Any) -> bool:
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_fits(option, value) for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(arguments[0], k) and _fits(arguments[1], v) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check_range(value: float, spec: Field, *, where: str) -> None:
    rules = {"ge": ("at least", value.__ge__), "gt": ("greater than", value.__gt__), "le": ("at most", value.__le__)}
    for name, (words, holds) in rules.items():
        bound = spec.metadata.get(name)
        if bound is not None and holds(type(value)(bound)) is not True:
            raise UserError(f"{where}: must be {words} {bound}, found {value!r} ({spec.metadata['doc']})")


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(option) for option in arguments)
    if origin is list:
        return f"a list of {_spell(arguments[0])}"
    if hint is types.NoneType:
        return "null"
    return getattr(hint, "__name__", str(hint))


def _exponent_hint(hint: Any, value: Any) -> str:
    # YAML 1.1 reads 5e-7 as text: the commonest slip in a learning rate.
    try:
        is_number = hint is float and isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        is_number = False
    return f"; YAML reads this as text, write it with a point: {float(value):.1e}" if is_number else ""


def _near(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name)[:100], map(str, known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}…"


def _key(name: Any) -> str:
    text = str(name)
    return text if len(text) <= 100 else f"{text[:97]}…"


def _show(value: Any) -> str:
    shown = asdict(value) if is_dataclass(value) else value
    return yaml.safe_dump(shown, default_flow_style=True).strip().removesuffix("...").strip()
