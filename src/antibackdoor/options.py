"""Hyper-parameters: frozen dataclasses checked by pydantic, filled from text, shown by `list`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from antibackdoor.errors import InputError, unknown

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose fields are validated whenever one is built.

    The fields ARE the hyper-parameters: `list`, `--set`, `config.json` and the content hash of a run follow from them.
    All numbers are finite, as in JSON.
    """
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast(type[T], pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls))


def build(cls: type[T], settings: Mapping[str, Any], what: str, *, base: Mapping[str, Any] | None = None) -> T:
    """An instance of the options class `cls` from names and values; text is converted to the field's type.

    A dotted name sets one field of a nested options class and leaves its others: `{"main.epochs": 30}`.
    base: settings that `settings` override. Raises InputError for a name that is no field (with the nearest one) and
    for a value out of its type or range.
    """
    start = cls(**(base or {}))
    chosen = {field.name: getattr(start, field.name) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        if first not in chosen:
            raise unknown(f"option of {what}", first, chosen)
        nested = chosen[first]
        if dataclasses.is_dataclass(nested) and not isinstance(nested, type) and (rest or isinstance(value, dict)):
            inner = {rest: value} if rest else value
            chosen[first] = build(type(nested), inner, f"{what}, {first}", base=vars(nested))
        elif rest:
            raise InputError(f"{what}: {first!r} has no parts, so {name!r} cannot be set.")
        else:
            chosen[first] = _parse(value)
    try:
        return cls(**chosen)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or what
        raise InputError(f"{what}: {where}={problem['input']!r} is not valid: {problem['msg']}.") from None


def _parse(value: Any) -> Any:
    """Text from the command line as JSON where it is null, a list or an object; else as it stands.

    Numbers and truth values stay text, which the field's own type converts: a block may be called "0".
    """
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return value
    return parsed if parsed is None or isinstance(parsed, list | dict) else value


def values(instance: Any) -> dict[str, Any]:
    """All fields of an options instance as plain JSON values."""
    plain: dict[str, Any] = TypeAdapter(type(instance)).dump_python(instance, mode="json")
    return plain


def flat(tree: Any, prefix: str = "", stop: Any = lambda _: False) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with dotted names; `stop` says which dicts count as leaves."""
    if isinstance(tree, dict) and tree and not stop(tree):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key), stop)
    else:
        yield prefix, tree


def describe(cls: type[Any], base: Any = None) -> list[dict[str, str]]:
    """One row a field: name, type, default, help; for `list NAME` and the docs. Fields of nested options have dots.

    base: an instance whose values are shown as the defaults.
    """
    base = cls() if base is None else base
    rows = []
    for name, info in cls.__pydantic_fields__.items():  # pydantic has resolved the annotations, dataclasses has not
        default = getattr(base, name)
        text = str(default) if isinstance(default, str) else json.dumps(TypeAdapter(Any).dump_python(default))
        row = {"name": name, "type": _type_text(info), "default": text, "help": info.description or ""}
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            rows.append({**row, "type": "options", "default": ""})
            rows += [{**inner, "name": f"{name}.{inner['name']}"} for inner in describe(type(default), default)]
        else:
            rows.append(row)
    return rows


def _type_text(info: FieldInfo) -> str:
    """A type as a user reads it: choices of a Literal, "null" for None, limits of a number."""
    limits = [
        f" {sign} {getattr(limit, key):g}"
        for limit in info.metadata
        for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(limit, key)
    ]
    return _name(info.annotation) + ",".join(limits)


def _name(annotation: Any) -> str:
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, parts))
    if get_origin(annotation) in {Union, UnionType}:
        return " | ".join(_name(part) for part in parts)
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) and not parts else str(annotation).replace("typing.", "")
