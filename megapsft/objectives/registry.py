"""Objectives by name: the files of this package are the list."""

from __future__ import annotations

import dataclasses
import difflib
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

import megapsft.objectives
from megapsft.errors import Refused
from megapsft.objectives._base import Base
from megapsft.types import Objective


def objective_names() -> tuple[str, ...]:
    """Names of all objectives, sorted: the public modules of the package, this one aside."""
    found = {module.name for module in pkgutil.iter_modules(megapsft.objectives.__path__)}
    return tuple(sorted(name for name in found if not name.startswith("_") and name != "registry"))


def objective_class(name: str) -> type[Base]:
    """The one objective that the file of this name defines: a file of this package, or any file, by its path (`mine/focal.py`).

    Raises:
        Refused: there is no such file, or it does not define one objective.
    """
    if str(name).endswith(".py"):
        module = _load(Path(name))
    elif name in objective_names():
        module = import_module(f"megapsft.objectives.{name}")
    else:
        remedy = suggest(str(name), objective_names()) + "; or a path to a .py file"
        raise Refused(f"objective.name={name!r}", "is not known", remedy)
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, Base)]
    if len(found) != 1:
        rule = f"defines {len(found)} objectives"
        raise Refused(f"objective.name={name!r}", rule, "write one subclass of PerToken in it (see psft.py)")
    return found[0]


def _load(path: Path) -> ModuleType:
    """The file as a module; it is the user's own code."""
    if not path.is_file():
        raise Refused(f"objective.name={str(path)!r}", "is not a file", "give the path of a file that defines one objective")
    name = f"megapsft_objective_{path.stem}"
    spec = spec_from_file_location(name, path)
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def build_objective(options: Mapping[str, Any]) -> Objective:
    """The objective of the config section `objective`: its `name`, and its own options.

    Raises:
        Refused: unknown name or option (lists the known ones), a value of another type, or one that breaks its rule.

    Example:
        >>> build_objective({"name": "psft", "clip_high": 0.2})
        PSFT(aggregation='token-mean', max_response_length=None, clip_high=0.2, freeze_below=None, ...)
    """
    options = dict(options)
    if "name" not in options:
        raise Refused("objective", "has no name", "set objective.name to one of " + ", ".join(objective_names()))
    cls = objective_class(options.pop("name"))
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        problem = error.errors()[0]
    refused = problem.get("ctx", {}).get("error")
    if isinstance(refused, Refused):  # from __post_init__, which has said it better
        raise refused from None
    key = "objective." + str(problem["loc"][0])
    fields = [field.name for field in dataclasses.fields(cls)]
    if problem["loc"][0] not in fields:
        raise Refused(key, f"is not an option of {cls.__name__}", suggest(str(problem["loc"][0]), fields))
    rule = problem["msg"][0].lower() + problem["msg"][1:]
    raise Refused(f"{key}={problem['input']!r}", rule, f"see the options of {cls.__name__}: " + ", ".join(fields))


def suggest(wrong: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, if any is near, and all of them."""
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)
