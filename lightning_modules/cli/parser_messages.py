"""What jsonargparse says of a wrong setting, as one line: the setting, its value, and the fix."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import torchvision
from jsonargparse import ArgumentParser

import datamodules
import imbsam
import lightning_modules
from imbsam import losses
from lightning_modules import backbones, detectors

CHOICES = {
    "backbone": backbones.__all__,
    "head": ["CosineClassifier"],
    "detector": detectors.__all__,
    "loss": losses.__all__,
    "sam": imbsam.__all__,
}
"""The classes to suggest, by the last part of a setting's name; for any other name, models and DataModules."""

_TYPES = {"float": "a number", "int": "an integer", "bool": "true or false", "str": "text", "list": "a list"}
_TOP_LEVEL = ("model", "data", "seed_everything", "config", "ckpt_path", "weights_only", "seeds")


def one_line(message: str) -> str:
    """The setting that is wrong, the value it got, and the fix.

    Args:
        message: jsonargparse's report, which lists every type that it tried for the value.

    Returns:
        One line; for a report of an unknown form, its informative lines joined.
    """
    readers = (_unknown_setting, _unknown_class, _missing_setting, _missing_file, _wrong_value)
    return next((line for read in readers if (line := read(message))), None) or _without_noise(message)


def settings_of(class_path: str) -> list[str]:
    """The names of the settings of a class or a function, with those that it passes on as ``**kwargs``."""
    module, _, name = class_path.rpartition(".")
    target: Any = getattr(importlib.import_module(module), name)
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    return [*add(target, fail_untyped=False)]


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """``; did you mean X?``, or nothing if no known name is similar."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(value.lower(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _key(message: str) -> str:
    return ".".join(re.findall(r'Parser key "([^"]+)":', message))


def _unknown_setting(message: str) -> str | None:
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        inner = re.match(r"\. Got value: Namespace\(class_path='([\w.]+)'", message[match.end() :])
        outer = re.findall(r"Problem with given class_path '([\w.]+)'", message[: match.start()])
        owner = inner[1] if inner else outer[-1] if outer else ""
        known = settings_of(owner) if owner else []
        name = owner.rpartition(".")[2] or "the class"
        meant = did_you_mean(match[1], known)
        if not meant and "sam" in known:  # rho, eta and the like are the method's
            inside = difflib.get_close_matches(match[1], settings_of("imbsam.ImbSAM"), n=1, cutoff=0.6)
            meant = f"; did you mean {_key(message)}.sam.{inside[0]}?" if inside else ""
        return f"{_key(message)}.{match[1]} is no setting of {name}{meant}"
    pattern = r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)"
    if match := re.search(pattern, message):
        name = match[1] or match[2]
        known = [*_TOP_LEVEL, *(f"trainer.{p}" for p in settings_of("lightning.pytorch.Trainer"))]
        top = name.partition(".")[0]
        return f"{name} is no setting{did_you_mean(name, known) or did_you_mean(top, _TOP_LEVEL)}"
    return None


def _unknown_class(message: str) -> str | None:
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        key = _key(message)
        known = CHOICES.get(key.rpartition(".")[2], [*lightning_modules.__all__, *datamodules.__all__])
        hint = did_you_mean(match[1], known) or "; a class of your own is a dotted path, such as my_module.MyClass"
        if match[1] in torchvision.models.list_models(module=torchvision.models):
            hint = f"; did you mean Torchvision with name {match[1]}?"
        return f"{key} is {match[1]}: there is no such class{hint}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        known = dir(importlib.import_module(match[1]))
        meant = did_you_mean(match[2], known)
        return f"{_key(message)} is {match[1]}.{match[2]}: {match[1]} has no {match[2]}{meant}"
    return None


def _missing_setting(message: str) -> str | None:
    if match := re.search(r"the following arguments are required: ([\w.]+)", message):
        return f"{_key(message)} needs {match[1]}: set {_key(message)}.{match[1]}, or name another class"
    return None


def _missing_file(message: str) -> str | None:
    match = re.search(r"File does not exist: '([^']+)'", message)
    return f"{_key(message)} is {match[1]}: there is no such file" if match else None


def _wrong_value(message: str) -> str | None:
    value = re.search(r"Got value: ([^\n]*?)\.?$", message, flags=re.MULTILINE)
    given = re.findall(r"Given value: ([^\n]*?)(?:\. Got value:|$)", message, flags=re.MULTILINE)
    shown = given[0] if given and not given[0].startswith("NestedArg") else value[1] if value else None
    if shown is None:
        return None
    if match := re.search(r"Expected a typing\.Literal\[([^\]]+)\]", message):
        known = [choice.strip().strip("'\"") for choice in match[1].split(",")]
        return f"{_key(message)} is {shown}: choose {', '.join(known)}{did_you_mean(shown, known)}"
    types = [t for t in re.findall(r"Expected an? <class '([\w.]+)'>", message) if t != "NoneType"]
    return f"{_key(message)} is {shown}: give {_TYPES.get(types[0], types[0])}" if types else None


def _without_noise(message: str) -> str:
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if not line.startswith(noise))
