"""Plain descriptions of plug-in objects, so that checkpoints hold class paths and arguments and never pickled objects.

An object is described as `{"class_path": "package.Class", "init_args": {...}}`, the form that configs use too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast, get_args, get_type_hints

from lit_rlhf.types import UserError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Describe `value` with plain types only.

    Dataclasses are described by their fields, other objects by the attributes that carry their constructor's argument
    names (the convention of every scorer here).

    Raises:
        TypeError: an object keeps no attribute for one of its constructor's arguments.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {name: plain(_argument(value, name)) for name in _argument_names(kind)},
    }


def build(value: Any, base: Callable[..., T]) -> T:
    """Turn a description made by `plain` back into an object; an object of the right kind passes through.

    Only classes that are already imported and derive from `base` are built, so that loading somebody's checkpoint
    cannot run code of its choice.

    Raises:
        UserError: the class is unknown, or is no `base`.
    """
    expected: Any = base  # annotated as a callable, since type checkers take no abstract class for a type
    if isinstance(value, expected):
        return cast("T", value)
    if not (isinstance(value, dict) and "class_path" in value):
        raise UserError(f"expected a {expected.__name__} or its class_path and init_args, got {value!r}")
    module_name, _, name = str(value["class_path"]).rpartition(".")
    kind = getattr(sys.modules.get(module_name), name, None)
    if not (isinstance(kind, type) and issubclass(kind, expected)):
        raise UserError(f"class_path {value['class_path']!r} is no {expected.__name__} that was imported")
    hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__)  # type: ignore[misc]
    arguments = {key: _nested(item, hints.get(key)) for key, item in value.get("init_args", {}).items()}
    return cast("T", kind(**arguments))


def build_optional(value: Any, base: Callable[..., T]) -> T | None:
    """Like `build`, and None stays None."""
    return None if value is None else build(value, base)


def _nested(value: Any, hint: Any) -> Any:
    """Build descriptions inside arguments, each as the class that the argument is annotated with and as no other."""
    if isinstance(value, list):
        return [_nested(item, hint) for item in value]
    if not (isinstance(value, dict) and set(value) == {"class_path", "init_args"}):
        return value
    kinds = [kind for kind in _classes(hint) if kind.__module__ != "builtins"]
    if len(kinds) != 1:
        raise UserError(f"class_path {value['class_path']!r} stands where no object was expected")
    return build(value, kinds[0])


def _classes(hint: Any) -> list[type]:
    """Return the classes named in an annotation, such as those of `Sequence[Scorer] | None`."""
    inner = [kind for argument in get_args(hint) for kind in _classes(argument)]
    return inner or ([hint] if isinstance(hint, type) and hint is not type(None) else [])


def _argument_names(kind: type) -> list[str]:
    if is_dataclass(kind):
        return [f.name for f in fields(kind) if f.init]
    found = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # what a class without __init__ shows
    return [parameter.name for parameter in found if parameter.name != "self" and parameter.kind not in several]


def _argument(value: Any, name: str) -> Any:
    if not hasattr(value, name):
        raise TypeError(f"{type(value).__name__} takes {name!r} but keeps no attribute of that name to describe it by")
    return getattr(value, name)
