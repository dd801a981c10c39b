"""Checks a composed configuration against the signatures that will consume it, before anything is built.

Hydra accepts unknown keys in recipe files; here every key must be a parameter of its `_target_`, and every plain value
must fit the parameter's annotation. Importing the targets is the only work done.
"""

import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from hydra.utils import get_object

from qat.errors import UserError

PLAIN = (bool, int, float, str)
CONTAINERS = (dict, Mapping, list, tuple, Iterable, Sequence, object)


def check(config: dict[str, Any], consumer: Callable[..., Any]) -> None:
    """Raise UserError naming the first key that nothing consumes, or whose value has the wrong type."""
    _check_call(config, consumer, "", complete=True)
    _check_nested(config, "")


def _check_nested(node: Any, path: str) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        where = f"{path}[{key}]" if isinstance(node, list) else f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and "_target_" in value:
            arguments = {k: v for k, v in value.items() if not k.startswith("_")}
            name = value["_target_"]
            try:
                target = get_object(name) if isinstance(name, str) else None
            except (ImportError, ValueError) as error:
                raise UserError(f"{where}._target_={name}: {str(error).splitlines()[0]}") from error
            if not callable(target):
                raise UserError(f"{where}._target_={name} is not a class or a function")
            _check_call(arguments, target, where, complete=not value.get("_partial_"))
        _check_nested(value, where)


def _check_call(arguments: dict[str, Any], target: Callable[..., Any], path: str, *, complete: bool) -> None:
    accepted = _parameters(target)
    for key, value in arguments.items():
        name = f"{path}.{key}" if path else key
        if key not in accepted:
            raise UserError(f"there is no key {name}; {suggestion(key, accepted)}")
        _check_value(name, value, accepted[key][0])
    missing = [key for key, (_, required) in accepted.items() if required and key not in arguments]
    if complete and missing:
        raise UserError(f"the configuration lacks {f'{path}.' if path else ''}{missing[0]}")


def _check_value(name: str, value: Any, kind: Any) -> None:
    """Into lists and mappings, so that the message names the entry."""
    if get_origin(kind) is dict and isinstance(value, dict):
        for key, entry in value.items():
            _check_value(f"{name}.{key}", entry, get_args(kind)[1])
    elif is_typeddict(kind) and isinstance(value, dict):
        entries = get_type_hints(kind)
        for key, entry in value.items():
            if key not in entries:
                raise UserError(f"there is no key {name}.{key}; {suggestion(key, entries)}")
            _check_value(f"{name}.{key}", entry, entries[key])
    elif get_origin(kind) is list and isinstance(value, list):
        for i, entry in enumerate(value):
            _check_value(f"{name}[{i}]", entry, get_args(kind)[0])
    elif not _fits(value, kind):
        raise UserError(f"{name}={value!r} does not fit: {_say(kind)} is expected")


def _parameters(target: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
    """Name → (annotation, required); a class that passes **options on also takes what its bases take."""
    found: dict[str, tuple[Any, bool]] = {}
    for function in [base.__init__ for base in target.__mro__] if inspect.isclass(target) else [target]:
        try:
            hints = get_type_hints(function)
        except (NameError, TypeError, AttributeError):  # annotations that only type checkers can resolve
            hints = {}
        parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self":
                found.setdefault(p.name, (hints.get(p.name, Any), p.default is p.empty))
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if kind is None or kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    if origin in (list, tuple) and isinstance(value, list):
        kinds = [k for k in get_args(kind) if k is not Ellipsis]
        return all(any(_fits(v, k) for k in kinds) for v in value)
    if kind is Any:
        return True
    if isinstance(value, dict | list) and (origin or kind) not in CONTAINERS:  # an object: its arguments come next
        return isinstance(value, dict) and "_target_" in value
    return value is not None and not isinstance(value, PLAIN)


def _say(kind: Any) -> str:
    """What fits, every choice once."""
    alternatives = list(_alternatives(kind))
    choices = dict.fromkeys(str(c) for k in alternatives if get_origin(k) is Literal for c in get_args(k))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    names |= {list: "a list", tuple: "a list"}
    others = [get_origin(k) or k for k in alternatives if get_origin(k) is not Literal]
    said = [f"one of {', '.join(choices)}"] if choices else []
    said += [names.get(k) or getattr(k, "__name__", str(k)) for k in others]
    return " or ".join(dict.fromkeys(said))


def _alternatives(kind: Any) -> Iterator[Any]:
    if get_origin(kind) not in (Union, types.UnionType):
        yield kind
        return
    for option in get_args(kind):
        yield from _alternatives(option)


def suggestion(key: str, known: Iterable[str]) -> str:
    """The nearest known keys, or all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(sorted(known))}"
