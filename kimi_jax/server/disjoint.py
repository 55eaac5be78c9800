"""Whether no value fits two alternatives: then ``oneOf`` means ``anyOf``, which the grammar compiler can enforce.

Told apart are types, listed values, and objects by the listed values of a property that both must have.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_jax.server.references import references, resolve

_MOST = 256  # alternatives, because each is compared with each
_KINDS = frozenset({"null", "boolean", "number", "string", "array", "object"})


@dataclass(frozen=True)
class _Facts:
    """What holds for every value that fits a schema. Knowing less is safe."""

    kinds: frozenset[str] = _KINDS
    values: frozenset | None = None  # it is one of them; None: of any
    tags: Mapping[str, frozenset] = field(default_factory=dict)  # as an object, it has these with one of the values

    def apart(self, other: _Facts) -> bool:
        common = self.kinds & other.kinds
        if not common or (self.values is not None and other.values is not None and not self.values & other.values):
            return True
        return common == {"object"} and any(
            name in other.tags and values.isdisjoint(other.tags[name]) for name, values in self.tags.items()
        )


class Disjoint:
    """Answers for alternatives within one ``root``, whose pointers are followed."""

    def __init__(self, root: Any):
        self._root = root
        self._pointed_at = any("/oneOf/" in ref for ref in references(root))  # by a name that has to stay
        self._targets: dict[str, _Facts] = {}

    def __call__(self, alternatives: Sequence[Any]) -> bool:
        if self._pointed_at or len(alternatives) > _MOST:
            return False
        facts = [self._facts(part) for part in alternatives]
        return all(a.apart(b) for a, b in itertools.combinations(facts, 2))

    def _facts(self, schema: Any) -> _Facts:
        if schema is False:
            return _Facts(frozenset())
        if not isinstance(schema, Mapping) or ("$id" in schema and schema is not self._root):
            return _Facts()  # a resource with an id has pointers of its own
        known = [_Facts(_kinds(schema.get("type")), tags=self._tags(schema))]
        if "const" in schema:
            known.append(_Facts(values=frozenset({_canonical(schema["const"])})))
        if isinstance(schema.get("enum"), list):
            known.append(_Facts(values=frozenset(map(_canonical, schema["enum"]))))
        if isinstance(schema.get("$ref"), str):
            known.append(self._target(schema["$ref"]))
        if isinstance(schema.get("allOf"), list):
            known += map(self._facts, schema["allOf"])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                known.append(_either([self._facts(part) for part in schema[key]]))
        return _all(known)

    def _target(self, ref: str) -> _Facts:
        if ref not in self._targets:
            self._targets[ref] = _Facts()  # where it leads back to itself
            self._targets[ref] = self._facts(resolve(self._root, ref))
        return self._targets[ref]

    def _tags(self, schema: Mapping[str, Any]) -> dict[str, frozenset]:
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            return {}
        names = properties.keys() & set(map(str, required))
        listed = {name: self._facts(properties[name]).values for name in names}
        return {name: values for name, values in listed.items() if values is not None}


def _all(known: Sequence[_Facts]) -> _Facts:
    kinds, values, tags = _KINDS, None, {}
    for facts in known:
        kinds &= facts.kinds
        if facts.values is not None:
            values = facts.values if values is None else values & facts.values
        for name, listed in facts.tags.items():
            tags[name] = listed & tags.get(name, listed)
    return _Facts(kinds if values is None else kinds & {kind for kind, _ in values}, values, tags)


def _either(known: Sequence[_Facts]) -> _Facts:
    values = [facts.values for facts in known if facts.values is not None]
    names = set(known[0].tags).intersection(*(facts.tags for facts in known)) if known else set()
    return _Facts(
        frozenset().union(*(facts.kinds for facts in known)),
        frozenset().union(*values) if len(values) == len(known) else None,
        {name: frozenset().union(*(facts.tags[name] for facts in known)) for name in names},
    )


def _kinds(kinds: Any) -> frozenset[str]:
    names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else _KINDS
    return frozenset("number" if name == "integer" else str(name) for name in names)


def _canonical(value: Any) -> tuple[str, Any]:
    """Kind and content, equal where JSON values are: 1 and 1.0, but not 1 and true."""
    if isinstance(value, Mapping):
        return "object", frozenset((name, _canonical(part)) for name, part in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_canonical, value))
    if isinstance(value, bool):
        return "boolean", value
    return "number" if isinstance(value, int | float) else "string" if isinstance(value, str) else "null", value
