"""JSON Schema (2020-12) as the grammar compiler wants it: what it cannot enforce is refused, never dropped.

Taken out is only what constrains nothing (formats that it does not know: ``format`` is an annotation) and what has no
finite value, because an answer that enters it cannot end.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from kimi_jax.errors import UserError
from kimi_jax.server.disjoint import Disjoint
from kimi_jax.server.finite import Finite
from kimi_jax.server.references import NAMED, rebase, references, steps

FORMATS = {"date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
_DAY = (
    f"(?:{_YEAR}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    f"|(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
)
_HOUR_AND_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_AND_MINUTE}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_HOUR_AND_MINUTE})"
_AS_PATTERNS = {"time": f"^{_TIME}$", "date-time": f"^{_DAY}[Tt]{_TIME}$"}  # the compiler's have second 60, always
_ALTERNATIVES = {"anyOf", "oneOf"}
_LISTS = {"allOf", "prefixItems"}
_SINGLE = {"items", "additionalProperties"}
_CLOSABLE = {"type", "properties", "required", "title", "description", "$schema", "$id", "$defs", "definitions"}


def normalize(schema: Any) -> Any:
    """``schema`` without what constrains nothing or never ends; UserError if the compiler would not enforce it."""
    if not isinstance(schema, Mapping | bool):
        raise UserError(f"a schema must be an object or a boolean, not {type(schema).__name__}")
    try:
        schema = rebase(schema)
        finite = Finite(schema)
        if not finite(schema):
            raise UserError("the schema has no finite value")
        pointed = frozenset(step for ref in references(schema) for step in steps(ref))
        return _normalize(schema, finite, Disjoint(schema), pointed)
    except RecursionError:
        raise UserError("the schema is nested too deeply") from None


def _normalize(schema: Any, finite: Finite, disjoint: Disjoint, pointed: frozenset[str]) -> Any:
    """``pointed``: names on the ways of pointers, which may lead through what is no keyword of schemas."""
    if not isinstance(schema, Mapping):
        return schema
    if "$id" in schema:
        disjoint = Disjoint(schema)
    normal = functools.partial(_normalize, finite=finite, disjoint=disjoint, pointed=pointed)
    _check_property_count(schema)
    required = schema.get("required")
    required = set(map(str, required)) if isinstance(required, list) else set()
    found, narrower = {}, []
    for key, value in schema.items():
        if key == "x-guidance" or (key, value) == ("uniqueItems", False):
            continue
        if key == "propertyNames" and value in (True, {}, {"type": "string"}):
            continue
        if key == "format" and not isinstance(value, str):
            raise UserError(f"a format must be a string, not {type(value).__name__}")
        if key == "format" and value in _AS_PATTERNS:
            narrower.append({"pattern": _AS_PATTERNS[value]})
            continue
        if key == "format" and value not in FORMATS:
            continue
        if key == "pattern" and isinstance(value, str):
            value = _exact_pattern(value)
        if key == "patternProperties" and isinstance(value, Mapping):
            value = {_exact_pattern(pattern): part for pattern, part in value.items()}
        if key in _INWARDS:
            value = _exact_bound(key, value)
        if key in ("const", "enum"):
            _check_exact(value)
        if key in NAMED and isinstance(value, Mapping):
            kept = required if key == "properties" else value.keys() if key[:4] in ("$def", "defi") else set()
            value = {name: normal(part) if name in kept or finite(part) else False for name, part in value.items()}
        elif key in _ALTERNATIVES and isinstance(value, list):
            parts = [part for part in value if finite(part)]
            value = [normal(part) for part in parts]
            if key == "oneOf" and "anyOf" not in schema and disjoint(parts):
                key = "anyOf"
        elif key in _LISTS and isinstance(value, list):
            value = [normal(part) for part in value]
        elif key in _SINGLE and isinstance(value, Mapping):
            value = normal(value) if finite(value) else False
        elif key in pointed:
            value = [normal(part) for part in value] if isinstance(value, list) else normal(value)
        found[key] = value
    if narrower and isinstance(found.setdefault("allOf", []), list):
        found["allOf"] += narrower
    _sound_bounds(found)
    return found


_STEP = 1e-9
_NUL = re.compile(r"\x00|\\(?:x00|u0000|0|[xu]\{0+\})")
_PATTERN_PARTS = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[xu]\{[0-9A-Fa-f]+\}|.)|\[\^?|.", re.DOTALL)
_WIDE = {r"\w": r"\w\p{L}\p{M}\p{N}", r"\d": r"\d\p{N}", r"\W": "[^A-Za-z0-9_]", r"\D": "[^0-9]"}
_PLAIN = {r"\<": "<", r"\>": ">"}  # ends of words to the compiler, and to no other dialect


def _exact_pattern(pattern: str) -> str:
    r"""``pattern`` narrowed to what every dialect matches.

    What is negated counts ``\w`` and ``\d`` as Unicode does, the rest as ASCII, and so what is negated twice; and it
    leaves out NUL, because the compiler lets a class that holds NUL match the escapes of quote and backslash, too.
    A class holds no class and no operators, which the compiler would read there.
    """
    found, start, negated = "", None, False  # of the class that is open
    for part in _PATTERN_PARTS.findall(pattern):
        if _NUL.fullmatch(part) and not negated:
            raise UserError(f"the pattern {pattern!r} speaks of NUL, which cannot be enforced")
        if start is None and part in ("[", "[^"):
            negated = part == "[^"
            found += part + r"\x00" * negated
            start = len(found)
            continue
        if start is not None and part == "]":
            if start == len(found):
                raise UserError(f"the pattern {pattern!r} has ] first in a class: dialects differ, write \\]")
            start, negated = None, False
        elif start is not None and part[0] in "[&~":
            part = "\\" + part
        elif negated and part in _WIDE:
            part = _WIDE[part]
        elif part in (r"\W", r"\D"):
            part = rf"[^\x00{_WIDE[part.lower()]}]"
        found += _PLAIN.get(part) or part
    return found


_MOST = 2**63 - 1024  # the last double of 64 bits: the compiler has no bounds beyond
_INWARDS = {"minimum": math.inf, "exclusiveMinimum": math.inf, "maximum": -math.inf, "exclusiveMaximum": -math.inf}


def _exact_bound(key: str, value: Any) -> Any:
    """A large bound as a double inside: the compiler rounds it, and what lies 1 inside if it is excluded, to either."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 2**53 <= abs(value) < math.inf:
        return value
    inwards = _INWARDS[key]
    if abs(value) > _MOST:
        if (value > 0) == (inwards > 0):
            raise UserError("numbers of more than 64 bits cannot be enforced")
        return _MOST if value > 0 else -_MOST
    bound = float(value)
    outside = bound < value if inwards > 0 else bound > value
    return int(math.nextafter(bound, inwards) if outside or key.startswith("exclusive") else bound)


def _check_exact(value: Any) -> None:
    """The compiler reads a number of many digits as a double nearby, and writes its digits filled up with zeros."""
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_exact(part)
    elif isinstance(value, float) or (isinstance(value, int) and abs(value) > 2**53):
        nearest = Decimal(repr(float(value)))
        exponent = int(nearest.normalize().as_tuple().exponent)
        other = value % 1 == 0 and nearest != value
        if other or abs(nearest.scaleb(-exponent)) > 2**53 or not -22 <= exponent <= 22:
            raise UserError(f"the number {value} has too many digits to be enforced: make it a string")


def _sound_bounds(schema: dict[str, Any]) -> None:
    """Moves a whole bound that is excluded just inside, if the other lies less than 1 away: it would be let through."""
    low, high = (_bound(schema, kind, pick) for kind, pick in (("Minimum", max), ("Maximum", min)))
    if low is None or high is None or not 0 < high - low < 1:
        return
    if low >= 0 and low == schema.get("exclusiveMinimum") and float(low).is_integer():
        del schema["exclusiveMinimum"]
        schema["minimum"] = low + _STEP
    if high <= 0 and high == schema.get("exclusiveMaximum") and float(high).is_integer():
        del schema["exclusiveMaximum"]
        schema["maximum"] = high - _STEP


def _bound(schema: dict[str, Any], kind: str, pick: Any) -> float | None:
    given = [schema.get(key) for key in (kind.lower(), f"exclusive{kind}")]
    numbers = [value for value in given if isinstance(value, int | float) and not isinstance(value, bool)]
    return pick(numbers) if numbers else None


def _check_property_count(schema: Mapping[str, Any]) -> None:
    """Names of additional properties may repeat in generation, so only one can be counted on to be new."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(set(map(str, required))) + 1:
        raise UserError(
            f"minProperties {least} exceeds the required properties by more than one; name more as required"
        )


def of_parameters(parameters: Any) -> dict[str, Any]:
    """The schema of a function's arguments: an object, without undeclared members unless it speaks of them."""
    schema = normalize({"properties": {}} if parameters is None else parameters)
    if not isinstance(schema, dict):
        raise UserError("parameters must be a schema of an object")
    kind = schema.setdefault("type", "object")
    if kind not in ("object", ["object"]):
        raise UserError(f"parameters must have type 'object', not {kind!r}")
    properties, required = schema.get("properties"), schema.get("required", [])
    known = (
        isinstance(properties, Mapping) and isinstance(required, list) and set(map(str, required)) <= set(properties)
    )
    if known and schema.keys() <= _CLOSABLE:
        schema["additionalProperties"] = False
    return schema
