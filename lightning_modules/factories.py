"""Factories: what builds a loss, a network or a method once the data are known.

A factory is a class, a partial of one (from the command line, if it has settings), a function, or a callable instance
of a dataclass.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from imbsam.errors import SettingError

__all__ = ["called", "describe", "plain_settings", "restore", "takes"]

Factory = Callable[..., Any]


def called(factory: Factory) -> Factory:
    """Return the class or function that a partial finally calls.

    Example:
        >>> called(functools.partial(dict, a=1))
        <class 'dict'>
    """
    while isinstance(factory, functools.partial):
        # jsonargparse's partial is one of an instantiator, whose last argument is the class
        factory = next((arg for arg in reversed(factory.args) if callable(arg)), factory.func)
    return factory


def takes(factory: Factory, parameter: str) -> bool:
    """Whether the factory has a parameter of this name."""
    return parameter in inspect.signature(called(factory)).parameters


def describe(factory: Factory | None) -> Any:
    """Return the factory as in a config.

    Returns:
        ``class_path`` and ``init_args`` (the settings that are plain values, with their defaults); only the path for a
        function without settings; None for None.

    Example:
        >>> from imbsam.losses import LDAM
        >>> describe(functools.partial(LDAM, max_margin=0.3))
        {'class_path': 'imbsam.losses.LDAM', 'init_args': {'max_margin': 0.3, 'scale': 30.0}}
    """
    if factory is None:
        return None
    target = called(factory)
    settings: dict[str, Any] = {}
    if dataclasses.is_dataclass(target) and not isinstance(target, type):
        settings, target = dataclasses.asdict(target), type(target)
    while isinstance(factory, functools.partial):
        settings = {**factory.keywords, **settings}
        factory = factory.func
    path = f"{target.__module__}.{getattr(target, '__qualname__', '')}"
    if not isinstance(target, type) and not settings:
        return path
    parameters = inspect.signature(target).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not None}
    plain: dict[str, Any] = {}
    for name, value in {**defaults, **settings}.items():
        with contextlib.suppress(TypeError):  # not plain data
            plain[name] = json.loads(json.dumps(value))
    return {"class_path": path, "init_args": plain}


def plain_settings(factory: Factory) -> dict[str, Any]:
    """Return the settings of :func:`describe`, empty for a function without settings."""
    described = describe(factory)
    return described["init_args"] if isinstance(described, Mapping) else {}


def restore(choice: Any) -> Any:
    """Return the factory that :func:`describe` described, as in a checkpoint; a factory is returned unchanged.

    Raises:
        SettingError: there is no such class.
    """
    if not isinstance(choice, (str, Mapping)):
        return choice
    path = choice if isinstance(choice, str) else str(choice["class_path"])
    module, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"class_path is {path}: there is no such class ({error})") from error
    settings = {} if isinstance(choice, str) else choice.get("init_args") or {}
    if dataclasses.is_dataclass(target) and isinstance(target, type):
        return target(**settings)
    return functools.partial(target, **settings) if settings else target
