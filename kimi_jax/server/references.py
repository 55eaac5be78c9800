"""JSON pointers in ``$ref``: following them, and putting right those of a schema that was embedded with its own root.

Generators make ``{"properties": {"x": {"$ref": "#/$defs/a", "$defs": {...}}}}`` of a schema that was written as a root.
Such a pointer leads nowhere from the real root; it is read from the nearest enclosing schema where it leads somewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

NAMED = {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}  # hold schemas by any name
_VALUES = {"enum", "const", "default", "examples", "example"}  # hold data, not schemas


def resolve(root: Any, ref: str) -> Any:
    """The target of a pointer in ``root``, else None."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    value = root
    for step in steps(ref):
        if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        else:
            return None
    return value


def steps(ref: str) -> list[str]:
    """The names on the way of a pointer."""
    return [unquote(step).replace("~1", "/").replace("~0", "~") for step in ref.split("/")[1:]]


def references(value: Any, named: bool = False) -> set[str]:
    """Every ``$ref`` in a schema, or in schemas by name."""
    if isinstance(value, list):
        return set().union(*map(references, value))
    if not isinstance(value, Mapping):
        return set()
    parts = [(key, part) for key, part in value.items() if named or key not in _VALUES]
    found = set().union(*(references(part, not named and key in NAMED) for key, part in parts))
    ref = value.get("$ref")
    return found | {ref} if isinstance(ref, str) else found


def rebase(root: Any) -> Any:
    """``root`` with pointers that lead somewhere from it, where that can be had."""
    return _rebase(root, [("#", root)])


def _rebase(value: Any, enclosing: list[tuple[str, Any]], named: bool = False) -> Any:
    if isinstance(value, list):
        return [_rebase(part, [*enclosing, (_join(enclosing, str(i)), part)]) for i, part in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if len(enclosing) > 1 and "$id" in value and not named:
        return value  # a resource of its own, whose pointers are its own
    found = {}
    for key, part in value.items():
        if key == "$ref" and isinstance(part, str):
            part = _lead(part, enclosing)
        elif named or key not in _VALUES:
            part = _rebase(part, [*enclosing, (_join(enclosing, key), part)], not named and key in NAMED)
        found[key] = part
    return found


def _join(enclosing: list[tuple[str, Any]], key: str) -> str:
    return f"{enclosing[-1][0]}/{quote(key.replace('~', '~0').replace('/', '~1'), safe='~$')}"


def _lead(ref: str, enclosing: list[tuple[str, Any]]) -> str:
    if not ref.startswith("#/") or resolve(enclosing[0][1], ref) is not None:
        return ref
    for pointer, schema in reversed(enclosing):
        if resolve(schema, ref) is not None:
            return pointer + ref[1:]
    return ref
