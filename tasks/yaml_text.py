"""YAML text -> a value: PyYAML's safe reader, without what it does in silence or cannot stand.

Two values under one key are refused, where it would take the last; so are aliases that unfold to far more than the text
holds, or into themselves. Whatever cannot be read is told with its line, where it would fail in many ways.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from rankwise import json_text
from rankwise.types import UserError

DEEPEST = 64  # lists and mappings inside one another
MOST_UNFOLDED = 10_000  # values that aliases may add, beside ten for each that the text holds
LARGEST_BITS = 64  # of a whole number
_MERGE = "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """Why a text is no YAML that can be used, with the line."""


def parse(text: str) -> Any:
    """The value of a YAML text; raises NotYaml."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_unfolded(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise NotYaml(str(error)) from None
    except RecursionError:
        raise NotYaml(_TOO_DEEP) from None


def read(path: Path, missing: str) -> Any:
    """The value in a file; raises UserError that names the place; missing: what to do where there is no such file."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {missing}") from None
    except (NotYaml, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


_TOO_DEEP = f"lists and mappings are nested more than {DEEPEST} deep"


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):  # of a number, a date, a truth value
            raise ConstructorError(None, None, f"{node.value[:60]!r} is no {kind}", node.start_mark) from None
        if isinstance(value, str) and value != json_text.whole_characters(value):
            raise ConstructorError(None, None, "half a character (a lone surrogate)", node.start_mark)
        if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
            raise ConstructorError(None, None, f"a number of more than {LARGEST_BITS} bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key, deep=True) if key.tag != _MERGE else None
            if key.tag == _MERGE or not isinstance(name, Hashable):
                continue
            if name in seen:
                raise ConstructorError(None, None, f"the key {str(name)[:60]!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _check_unfolded(root: yaml.Node) -> None:
    """Raise where aliases unfold into themselves or to far more than the text holds, or nesting is too deep."""
    sizes: dict[int, int] = {}  # by the node: values in it, every alias unfolded; 0 while it is looked at

    def size(node: yaml.Node, depth: int) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            if depth > DEEPEST:
                raise ConstructorError(None, None, _TOO_DEEP, node.start_mark)
            sizes[id(node)] = 0
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
            held.append(len(parts))
        if not sizes[id(node)]:
            raise ConstructorError(None, None, "it holds an alias of itself", node.start_mark)
        return sizes[id(node)]

    held: list[int] = []
    unfolded = size(root, 1)
    if unfolded > MOST_UNFOLDED + 10 * sum(held):
        raise ConstructorError(None, None, f"its aliases unfold to {unfolded:,} values", root.start_mark)
