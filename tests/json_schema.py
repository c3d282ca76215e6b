"""The part of JSON Schema that docs/inspect.schema.json uses, in some lines; any other keyword is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
KEYWORDS = {
    "$defs", "$ref", "$schema", "additionalProperties", "const", "description", "enum", "items", "maxItems", "minItems",
    "minimum", "pattern", "properties", "required", "title", "type",
}  # fmt: skip


def faults(value: Any, schema: Any, root: Any = None, at: str = "", *, closed: bool = False) -> Iterator[str]:
    """Give what is wrong with a value.

    Args:
        value: what was decoded from JSON.
        schema: the schema, or a part of it.
        root: the whole schema.
        at: the place of the value, for messages.
        closed: True to take a field that the schema does not list for a fault, where it lists fields.
    """
    root = schema if root is None else root
    assert set(schema) <= KEYWORDS, set(schema) - KEYWORDS
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "const" in schema and value is not schema["const"] and value != schema["const"]:
        yield f"{at}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and (isinstance(value, bool) or not any(isinstance(value, TYPES[kind]) for kind in kinds)):
        yield f"{at}: {value!r} is no {' or '.join(kinds)}"
        return
    if isinstance(value, list | dict):
        yield from member_faults(value, schema, root, at, closed)
    elif "minimum" in schema and value < schema["minimum"]:
        yield f"{at}: {value} is below {schema['minimum']}"
    elif "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: {value!r} does not match {schema['pattern']}"


def member_faults(value: Any, schema: Any, root: Any, at: str, closed: bool) -> Iterator[str]:
    """Give what is wrong with the members of a list or a map."""
    if isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            yield f"{at}: {len(value)} items"
        if len(value) < schema.get("minItems", 0):
            yield f"{at}: {len(value)} items"
        for number, item in enumerate(value):
            yield from faults(item, schema.get("items", {}), root, f"{at}[{number}]", closed=closed)
        return
    listed, others = schema.get("properties", {}), schema.get("additionalProperties")
    yield from (f"{at}: {name} is missing" for name in schema.get("required", ()) if name not in value)
    for name, item in value.items():
        part = listed.get(name, others)
        if isinstance(part, dict):
            yield from faults(item, part, root, f"{at}.{name}", closed=closed)
        elif closed and listed and others is not True:
            yield f"{at}: {name} is not listed"
