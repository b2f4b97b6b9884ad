"""Choices that are objects: a class, or a partial of one, that is called once the data are known."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from imbsam.errors import SettingError

__all__ = ["called", "describe", "restore", "takes"]

Factory = Callable[..., Any]


def called(factory: Factory) -> Factory:
    """Return the class or function that a partial (the command line makes one of every choice) calls in the end.

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


def describe(factory: Factory) -> dict[str, Any]:
    """Return the choice as a config has it: ``class_path`` and ``init_args``, the settings that are plain values.

    Example:
        >>> from imbsam import ImbSAM
        >>> describe(functools.partial(ImbSAM, eta=50))
        {'class_path': 'imbsam.sam.ImbSAM', 'init_args': {'eta': 50}}
    """
    target = called(factory)
    settings: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        settings = {**factory.keywords, **settings}
        factory = factory.func
    plain = {name: value for name, value in settings.items() if _is_plain(value)}
    return {"class_path": f"{target.__module__}.{getattr(target, '__qualname__', '')}", "init_args": plain}


def restore(choice: Factory | Mapping[str, Any]) -> Factory:
    """Return the factory of a :func:`describe`, as a checkpoint keeps it; a factory is returned as it is.

    Raises:
        SettingError: there is no such class.
    """
    if not isinstance(choice, Mapping):
        return choice
    module, _, name = str(choice["class_path"]).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"class_path is {choice['class_path']}: there is no such class ({error})") from error
    return functools.partial(target, **(choice.get("init_args") or {}))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
