"""`@config`: frozen dataclasses whose numbers are traced and whose structure is static.

A hyper-parameter annotated `Number` (and every nested config) is a leaf of the JAX tree, so a compiled function takes
it as an argument and a sweep over it compiles once. Everything else (int, bool, str, float, None, Literal and tuples of
them) is structure: part of the tree's definition and of the compiled function's identity.
"""

import dataclasses
import math
import types
import typing
from pathlib import Path

import jax
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import Array, Float

from rlhf.errors import ConfigError, nearest

Number = float | Float[Array, ""]  # a float in a yaml, a traced scalar in a compiled function

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # the tower: 1 is fine where a float is asked for
_STATIC = (bool, int, float, str, bytes, type(None), Path)


def _is_static(hint: object) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType, tuple):
        return all(part is Ellipsis or _is_static(part) for part in typing.get_args(hint))
    return hint in _STATIC


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type) -> type:
    """Make `cls` a frozen, keyword-only, type-checked dataclass and a JAX tree.

    Lists become tuples (a yaml has no tuples). The constructor checks names and types and raises ConfigError, whose
    message begins with the setting's name; rebuilding from leaves inside JAX checks nothing, since JAX also puts
    tracers, shapes and sentinels there.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls)
    static = tuple(f.name for f in fields if _is_static(hints[f.name]))
    traced = tuple(f.name for f in fields if f.name not in static)
    init = "__init__"  # by name: to the type checker, each class has a constructor of its own
    checked = _check(getattr(cls, init))

    def __init__(self, **settings):
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        _check_names(cls, fields, settings)
        try:
            checked(self, **settings)
        except BeartypeCallHintParamViolation as error:
            name = next((f.name for f in fields if f"parameter {f.name}=" in str(error)), "a setting")
            wanted = type_name(hints[name]) if name in hints else "another type"
            given = settings.get(name)
            message = f"{name}={given!r} of {cls.__name__} must be {wanted}{_subclasses(hints.get(name), given)}"
            raise ConfigError(message) from error

    def flatten_with_keys(self):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in traced)
        return children, tuple(getattr(self, name) for name in static)

    def unflatten(structure, leaves):
        self: typing.Any = object.__new__(cls)
        for name, value in zip((*traced, *static), (*leaves, *structure), strict=True):
            object.__setattr__(self, name, value)
        return self

    setattr(cls, init, __init__)
    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def _check_names(cls: type, fields: tuple, settings: dict) -> None:
    names = [f.name for f in fields]
    for name in settings:
        if name not in names:
            raise ConfigError(f"{name} is no setting of {cls.__name__}{nearest(name, names)}")
    for f in fields:
        if f.name not in settings and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{f.name} is missing: {cls.__name__} needs it")


def _below(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    deeper = [one for sub in direct for one in _below(sub)]
    return [one for one in direct if dataclasses.is_dataclass(one)] + deeper


def _subclasses(hint: object, given: object) -> str:
    """The end of a message about a name where an object is due: how the class of that name is given, or which are."""
    if not isinstance(given, str) or not isinstance(hint, type) or _is_static(hint):
        return ""
    named = {one.__name__: f"'{{_target_: {one.__module__}.{one.__name__}, …}}'" for one in _below(hint)}
    same = [text for name, text in named.items() if name.lower() == given.lower()]
    return f", given as {same[0] if same else ' or '.join(sorted(named.values()))}" if named else ""


def type_name(hint: object) -> str:
    """A type as a user would say it: `a number`, `an integer or none`, `one of 'a', 'b'`."""
    words: dict[object, str] = {
        float: "a number",
        int: "an integer",
        bool: "true or false",
        str: "a text",
        type(None): "none",
        Path: "a path",
    }
    if hint in words:
        return words[hint]
    if hint == Number:
        return "a number"
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(p) for p in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(p) for p in parts if "jaxtyping" not in repr(p)))
    if origin is tuple:
        return "a list of " + type_name(parts[0]).removeprefix("a ")
    return f"an object of class {getattr(hint, '__name__', hint)} (or a subclass)"


def require_range(
    owner: object,
    *names: str,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    may_be_infinite: bool = False,
) -> None:
    """Refuse settings of `owner` outside a range; a traced value was checked when it was a number.

    NaN is in no range, and an infinity only where `may_be_infinite`: where it means that there is no bound.

    Raises:
        ConfigError: names the class, the field, the value and the range.
    """
    for name in names:
        _require_range(owner, name, at_least, at_most, above, may_be_infinite)


def _require_range(
    owner: object,
    name: str,
    at_least: float | None,
    at_most: float | None,
    above: float | None,
    may_be_infinite: bool,
) -> None:
    value = getattr(owner, name)
    if value is None or isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array):
        value = float(value)  # comparing arrays would compile a program for each comparison
    rules = [
        (at_least is None or value >= at_least, f"at least {at_least:g}" if at_least is not None else ""),
        (at_most is None or value <= at_most, f"at most {at_most:g}" if at_most is not None else ""),
        (above is None or value > above, f"above {above:g}" if above is not None else ""),
    ]
    if not (isinstance(value, int) or math.isfinite(value) or (may_be_infinite and math.isinf(value))):
        rules.append((False, "a number" if may_be_infinite else "finite"))
    if not all(holds for holds, _ in rules):
        wanted = " and ".join(text for _, text in rules if text)
        raise ConfigError(f"{name}={value!r} of {type(owner).__name__} must be {wanted}")
