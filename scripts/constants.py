"""Sets constants of modules while something is traced with them, for benchmarks that compare their values."""

import ast
import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax


@contextlib.contextmanager
def values_set(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """Sets a module's constants for a while."""
    kept = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


@contextlib.contextmanager
def constants_set(text: str, package: str) -> Iterator[None]:
    """Sets the constants that `text` names, "module.NAME=value,…" below `package`; JAX traces everything anew.

    One of a dictionary's is "module.NAME.key"; integers of a dataclass or a tuple are written as a tiling: 32:2:3:512.

    Raises:
      AttributeError, KeyError, ModuleNotFoundError, ValueError: there is no such constant, key, module or value.
    """
    if not text:
        yield
        return
    with contextlib.ExitStack() as stack:
        for one in text.split(","):
            place, value = one.split("=")
            module, name, *keys = place.split(".")
            module = importlib.import_module(f"{package}.{module}")
            value = _parsed(value, getattr(module, name), *keys)
            stack.enter_context(values_set(module, {name: value}))
        jax.clear_caches()
        stack.callback(jax.clear_caches)
        yield


def _parsed(value: str, present: Any, *keys: str) -> Any:
    """Returns what `value` stands for in the place of `present`, or of what a dictionary has by a key."""
    if keys:
        key, *rest = keys
        return {**present, key: _parsed(value, present[key], *rest)}
    if dataclasses.is_dataclass(present):
        return type(present)(*map(int, value.split(":")))
    if isinstance(present, tuple):
        return tuple(map(int, value.split(":")))
    return ast.literal_eval(value)
