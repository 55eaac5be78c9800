"""Which JSON Schemas have a finite value: recursion without a way out would have an answer go on for ever.

The least fixed point over local references: a schema is finite if a value can be built from finite parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kimi_jax.server.references import references, resolve


class Finite:
    """Answers for the subschemas of one ``root``. What it cannot follow counts as finite; the compiler judges it."""

    def __init__(self, root: Any):
        self._root = root
        self._targets = {ref: resolve(root, ref) for ref in references(root)}
        self._known = {ref for ref, target in self._targets.items() if target is None}
        grown = True
        while grown:
            new = {ref for ref, target in self._targets.items() if ref not in self._known and self(target)}
            self._known |= new
            grown = bool(new)

    def __call__(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return schema is not False
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref not in self._known:
            return False
        if not all(self(part) for part in _list(schema, "allOf")):
            return False
        for key in ("anyOf", "oneOf"):
            if key in schema and not any(self(part) for part in _list(schema, key)):
                return False
        if "enum" in schema or "const" in schema:
            return True
        kinds = schema.get("type", "string")
        kinds = {kinds} if isinstance(kinds, str) else set(map(str, kinds)) if isinstance(kinds, list) else {"string"}
        if kinds - {"object", "array"}:
            return True
        return ("object" in kinds and self._object(schema)) or ("array" in kinds and self._array(schema))

    def _object(self, schema: Mapping[str, Any]) -> bool:
        properties = schema.get("properties", {})
        rest = schema.get("additionalProperties", True) if "patternProperties" not in schema else True
        if not isinstance(properties, Mapping):
            return True
        return all(self(properties.get(name, rest)) for name in map(str, _list(schema, "required")))

    def _array(self, schema: Mapping[str, Any]) -> bool:
        least = schema.get("minItems", 0)
        prefix = _list(schema, "prefixItems")
        if not isinstance(least, int | float):
            return True
        if not all(self(part) for part in prefix[: int(least)]):
            return False
        return least <= len(prefix) or self(schema.get("items", True))


def _list(schema: Mapping[str, Any], key: str) -> list:
    value = schema.get(key, [])
    return value if isinstance(value, list) else []
