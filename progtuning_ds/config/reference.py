"""The reference of all settings, generated from the dataclasses' own docstrings. No torch, no deepspeed."""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from typing import Any

from pydantic_core import PydanticUndefined

from progtuning_ds.config.problems import field_info, is_section, section_kinds
from progtuning_ds.config.schema import RunConfig

_NAMES = {"str": "text", "int": "integer", "float": "number", "bool": "true|false", "dict": "mapping"}


def reference(width: int = 100) -> str:
    """Return every section and field with its type, default and meaning, as plain text."""
    out: list[str] = []
    for field in dataclasses.fields(RunConfig):
        info = field_info(RunConfig, field.name)
        if is_section(RunConfig, field.name):
            kinds = section_kinds(RunConfig, field.name)
            for kind, section in kinds.items() or [(None, info.annotation)]:
                name = f"{field.name} (kind: {kind})" if kind else field.name
                out += _section(name, section, width)
        else:
            out += ["", *_entry(field.name, info, width)]
    return "\n".join(out).strip("\n")


def _section(name: str, section: type, width: int) -> list[str]:
    doc = " ".join((section.__doc__ or "").split())
    out = ["", *textwrap.wrap(f"{name}:  {doc}", width, subsequent_indent="    ")]
    for inner in dataclasses.fields(section):
        out += _entry(f"  {inner.name}", field_info(section, inner.name), width)
    return out


def _entry(name: str, info: Any, width: int) -> list[str]:
    default = info.get_default(call_default_factory=True)
    shown = "" if default is None or default == [] or default is PydanticUndefined else f", default {_yaml(default)}"
    text = f"({_type_name(info.annotation)}{shown}) {info.description}"
    indent = " " * 32
    body = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    body[0] = f"{name:<31} {body[0].lstrip()}"
    return body


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [_type_name(kind) for kind in typing.get_args(annotation) if kind is not types.NoneType]
        return " or ".join(kinds)
    if origin is list:
        return f"list of {_type_name(typing.get_args(annotation)[0])}"
    kind = origin or annotation
    return _NAMES.get(kind.__name__, kind.__name__)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
