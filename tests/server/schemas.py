"""JSON Schemas of many kinds: each has finite values, all of which a grammar can produce."""

S, N, INT, B, Z = ({"type": kind} for kind in ("string", "number", "integer", "boolean", "null"))


def obj(required=(), closed=True, **properties):
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return schema | ({"additionalProperties": False} if closed else {})


def arr(items, **limits):
    return {"type": "array", "items": items, **limits}


SCALARS = [
    *(
        S,
        N,
        INT,
        B,
        Z,
        {},
        {"type": ["string", "null"]},
        {"type": ["integer", "boolean", "array"]},
        {"title": "anything"},
    ),
    *({"const": value} for value in (None, 0, -1.5, 'a"\\/\n\u2028é😀', [], {}, [1, {"a": None}], True)),
    {"enum": ["red", "green", "", " ", "\t", "a b"]},
    {"enum": [1, 2.5, -3, 1e3, None, False, {"k": [1]}, "1"]},
    {"type": "integer", "enum": [1, "1", 2.5, None, 7]},
    {"type": "string", "enum": ["true", "null", "1", "😀", "\\"]},
]
NUMBERS = [
    *(
        {"type": "integer", "minimum": a, "maximum": b}
        for a, b in ((0, 0), (-5, 5), (7, 123), (-1000, -999), (0, 10**12))
    ),
    *({"type": "integer", key: 17} for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    *({"type": "number", "minimum": a, "maximum": b} for a, b in ((0, 1), (-1.5, 2.25), (0.1, 0.2), (99.5, 1000))),
    *({"type": "number", "exclusiveMinimum": a, "exclusiveMaximum": b} for a, b in ((0, 1), (-2.5, -2.25))),
    *({"type": "number", "exclusiveMinimum": a, "maximum": b} for a, b in ((0, 0.25), (1, 1.5), (0.5, 1))),
    *({"type": "number", "minimum": a, "exclusiveMaximum": b} for a, b in ((-0.25, 0), (-1.5, -1), (0.5, 1))),
    *({"type": "number", key: -0.5} for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    *({"type": "integer", "multipleOf": k} for k in (2, 7, 10)),
    {"type": "integer", "multipleOf": 5, "minimum": 3, "maximum": 99},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 8},
    {"minimum": 3, "maximum": 9},
    {"type": ["integer", "null"], "minimum": 1, "maximum": 3},
]
STRINGS = [
    *({"type": "string", "minLength": a, "maxLength": b} for a, b in ((0, 0), (1, 1), (3, 5), (0, 40), (20, 20))),
    {"type": "string", "minLength": 4},
    {"type": "string", "maxLength": 3},
    *(
        {"type": "string", "pattern": pattern}
        for pattern in (
            r"^[a-z]{2,4}$",
            r"^\d{3}-\d{4}$",
            r"^(GET|POST) /[\w/]*$",
            r"^x",
            r"^$",
            r"^[^\"\\]{1,3}$",
            r"^(\([0-9]{3}\))?[0-9]{3}-[0-9]{4}$",
            r"^#[0-9A-Fa-f]{6}$",
            r"^\w{1,3}@\w{1,3}\.\w{2}$",
            r"^[^\"]{1,2}$",
            r"^[^\\]{1,2}[^\s\n\]]$",
            r"^[\u4e00-\u9fff]{1,3}$",
            r"^v\d+(\.\d+){0,2}$",
        )
    ),
    *(
        {"type": "string", "pattern": pattern, "maxLength": 3}
        for pattern in ("ab", "y$", "^a|b$", r"\S\W", r"^[^\w]\D", ".")
    ),
    {"type": "string", "pattern": "^a*$", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[ab]+$", "enum": ["ab", "abc", "ba"]},
    *({"type": "string", "format": f} for f in ("date", "time", "date-time", "ipv4", "uuid", "duration", "ipv6")),
    {"type": "string", "format": "color"},
    {"type": "string", "contentEncoding": "base64", "description": "d"},
]
ARRAYS = [
    *(arr(item) for item in (S, INT, {}, B, arr(Z), {"enum": [1, 2]})),
    *(arr(INT, minItems=a, maxItems=b) for a, b in ((0, 0), (1, 1), (2, 4), (0, 3), (10, 10))),
    arr(S, minItems=3),
    arr(B, maxItems=2),
    {"type": "array"},
    {"type": "array", "uniqueItems": False, "items": B},
    {"type": "array", "prefixItems": [S, INT], "items": False},
    {"type": "array", "prefixItems": [S, INT], "items": B, "maxItems": 4},
    {"type": "array", "prefixItems": [B, Z], "minItems": 2},
    arr({"anyOf": [S, INT, obj(["x"], x=N)]}, minItems=1),
]
OBJECTS = [
    *(obj(), obj(a=S), obj(["a"], a=S), obj(["b", "a"], a=S, b=INT, c=B), obj(["a"], closed=False, a=INT)),
    {"type": "object"},
    {"type": "object", "additionalProperties": INT},
    {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": {"enum": ["hi"]}}},
    {"type": "object", "properties": {"x": S, "y": INT}, "additionalProperties": INT},
    {"type": "object", "properties": {"a": S}, "additionalProperties": INT},
    {"type": "object", "required": ["free"]},
    {"type": "object", "required": ["z"], "properties": {"a": INT}, "additionalProperties": B},
    {"type": "object", "minProperties": 1, "additionalProperties": B},
    {"type": "object", "maxProperties": 2, "additionalProperties": INT},
    {"type": "object", "required": ["k"], "minProperties": 2, "properties": {"k": INT}, "additionalProperties": INT},
    {"type": "object", "patternProperties": {"^n_": N}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^n_": N, "^s_": S}, "additionalProperties": B},
    {"type": "object", "properties": {"n_a": INT}, "patternProperties": {"^n_": {"type": "number", "minimum": 0}}},
    *(
        obj([key], **{key: INT})
        for key in ("", " ", "a b", "é", "😀", 'a"b', "\\n", "a/b", "$ref", "type", "format", "111")
    ),
    obj(["a", "ab", "abc"], a=INT, ab=INT, abc=INT),
    obj(["uniqueItems"], uniqueItems=B, items=S, enum={"enum": [1]}, **{"x-guidance": Z}),
    obj(["o"], o=obj(["p"], p=obj(["q"], q=arr(obj(["r"], r=B))))),
    {"type": "object", "properties": {"a": True, "b": False}, "required": ["a"]},
]
COMBINED = [
    {"anyOf": [S, INT]},
    {"anyOf": [obj(["circle"], circle=obj(["r"], r=N)), obj(["box"], box=obj(["w", "h"], w=N, h=N))]},
    {"anyOf": [arr(S), obj(["n"], n=INT), Z], "description": "one of three"},
    {"oneOf": [S, INT, Z]},
    {"oneOf": [obj(["t"], t={"const": "a"}, v=INT), obj(["t"], t={"const": "b"}, v=S)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"allOf": [obj(["a"], closed=False, a=S), obj(["b"], closed=False, b=INT)]},
    {"type": "object", "properties": {"a": INT, "b": INT}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"type": "string", "anyOf": [{"minLength": 3, "maxLength": 4}, {"const": "x"}]},
    {"type": "integer", "anyOf": [{"maximum": -10}, {"minimum": 10}]},
]
LIST = {
    "type": "object",
    "properties": {"v": INT, "next": {"anyOf": [Z, {"$ref": "#/$defs/list"}]}},
    "required": ["v", "next"],
}
TREE = obj(["v"], v={"enum": [0, 1]}, kids=arr({"$ref": "#/$defs/tree"}, maxItems=2))
REFERENCES = [
    {"$ref": "#/$defs/a", "$defs": {"a": INT}},
    {"$ref": "#/definitions/a", "definitions": {"a": S}},
    {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/a/properties/q"}},
        "$defs": {"a": obj(q=B)},
        "required": ["p"],
    },
    {"$ref": "#/$defs/list", "$defs": {"list": LIST | {"additionalProperties": False}}},
    {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
    obj(["name"], name={"enum": ["n"]}, child={"$ref": "#"}),
    {"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": B}},
    {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "boolean"}}},
    {"$id": "https://example.com/root", "$ref": "item", "$defs": {"i": {"$id": "item", "type": "null"}}},
    {"$id": "https://example.com/root", "$ref": "#/$defs/i", "$defs": {"i": {"$ref": "#/$defs/j"}, "j": B}},
    {"$ref": "#/$defs/positive", "maximum": 3, "$defs": {"positive": {"type": "integer", "minimum": 1}}},
    {"$defs": {"x": obj(["y"], y={"$ref": "#/$defs/z"}), "z": arr({"$ref": "#/$defs/x"})}, "$ref": "#/$defs/z"},
    obj(a={"$ref": "#/$defs/endless"}, b=INT) | {"$defs": {"endless": obj(["more"], more={"$ref": "#/$defs/endless"})}},
]
EMBEDDED = [  # schemas written as roots
    {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
    {"type": "object", "properties": {"a": INT, "b": {"$ref": "#/properties/a"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"$ref": "#/$defs/a~1b%25"}, "minItems": 1, "$defs": {"a/b%": {"enum": ["x"]}}},
]
SCHEMAS = [*SCALARS, *NUMBERS, *STRINGS, *ARRAYS, *OBJECTS, *COMBINED, *REFERENCES]

REFUSED = [
    {"type": "dict"},
    {"not": S},
    {"if": S, "then": {"minLength": 1}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": S},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "object", "minProperties": 3},
    {"type": "object", "properties": {"a": INT}, "minProperties": 2},
    {"type": "string", "pattern": "^(?=a)b"},
    {"type": "string", "pattern": "(a"},
    {"oneOf": [N, INT]},
    {"$ref": "https://example.com/elsewhere"},
    {"$ref": "#/$defs/missing"},
    {"$ref": "#"},
    {"enum": []},
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"x-guidance": {"lenient": True}, "not": S},
    {"properties": {"a": {"not": {}}}, "type": "object"},
    {"type": "object", "properties": []},
    obj(["more"], more={"$ref": "#"}),
    False,
    3,
]
