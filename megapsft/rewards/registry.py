"""Rewards by name: the files of this package are the list, and the user's own by their path."""

from __future__ import annotations

import dataclasses
import difflib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import megapsft.rewards
from megapsft.errors import Refused
from megapsft.rewards._base import Base
from megapsft.rewards._pool import Pool
from megapsft.rewards._user import User, user_target
from megapsft.rewards.sum import Sum

NOT_REWARDS = frozenset({"answer", "registry", "sum"})
TAKEN = frozenset({"mean", "max", "min", "timeouts", "deaths", "errors"})  # of the keys reward/<label>
OWN = ("weight", "label", "timeout")  # of an entry for a user's function; the other keys are its options


def reward_names() -> tuple[str, ...]:
    """Names of all rewards, sorted: the public modules of the package, those aside that are none."""
    found = {module.name for module in pkgutil.iter_modules(megapsft.rewards.__path__)}
    return tuple(sorted(name for name in found - NOT_REWARDS if not name.startswith("_")))


def reward_class(name: str) -> type[Base]:
    """The one reward that the file of this name defines.

    Raises:
        Refused: there is no such file.
    """
    if name not in reward_names():
        remedy = _suggest(name, reward_names()) + "; or path/to/file.py, or package.module:function"
        raise Refused(f"reward {name!r}", "is not known", remedy)
    module = import_module(f"megapsft.rewards.{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    (found,) = [c for c in classes if issubclass(c, Base)]
    return found


def build_reward(entry: Mapping[str, Any]) -> tuple[str, Base]:
    """(label, reward) of one entry of the config: `name`, `weight`, `label`, and the options of its own.

    Raises:
        Refused: unknown name or option (lists the known ones), a value of another type, or one that breaks its rule.

    Example:
        >>> build_reward({"name": "length", "weight": 0.5, "soft_limit": 100})
        ('length', Length(weight=0.5, label=None, soft_limit=100, price=0.001, most=1.0))
    """
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise Refused(f"reward {dict(entry)!r}", "has no name", "give one of " + ", ".join(reward_names()))
    if name.endswith(".py") or ":" in name:
        theirs = {key: value for key, value in options.items() if key not in OWN}
        ours = {key: value for key, value in options.items() if key in OWN}
        reward: Base = _validated(name, User, ours | {"target": user_target(name), "options": theirs})
    else:
        reward = _validated(name, reward_class(name), options)
    label = reward.label or (_own_label(name) if isinstance(reward, User) else name)
    if label in TAKEN or not label.isidentifier():
        rule = "must be a word, and not one of " + ", ".join(sorted(TAKEN))
        raise Refused(f"label={label!r} of reward {name}", rule, "give it another `label`")
    return label, reward


def build_rewards(entries: Sequence[Mapping[str, Any]], workers: int = 2, memory_bytes: int = 1 << 30) -> Sum:
    """The weighted sum of the config section `rewards`, checked; close it when done, or use it in a `with`.

    Args:
        workers: processes for what may not return.
        memory_bytes: of address space for each, beyond its imports.

    Raises:
        Refused: no entry, two with one label, or as `build_reward`; a function of the user's that cannot be called.

    Example:
        >>> build_rewards([{"name": "math_answer"}, {"name": "format", "weight": 0.1}, {"name": "mine/reward.py", "weight": 0.5}])
    """
    if not entries:
        raise Refused("rewards", "names none", "name one at least: " + ", ".join(reward_names()))
    rewards: dict[str, Base] = {}
    for entry in entries:
        label, reward = build_reward(entry)
        if label in rewards:
            raise Refused(f"rewards: {label}", "is there twice, and its metrics would be one", "give one of them a `label`")
        rewards[label] = reward
    return Sum(rewards, Pool(workers, memory_bytes))


def _validated(name: str, cls: type[Base], options: Mapping[str, Any]) -> Base:
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        problem = error.errors()[0]
    refused = problem.get("ctx", {}).get("error")
    if isinstance(refused, Refused):  # from __post_init__, which has said it better
        raise Refused(f"reward {name}: {refused.value}", refused.rule, refused.remedy) from None
    fields = [field.name for field in dataclasses.fields(cls)]
    option, key = str(problem["loc"][0]), f"reward {name}: {problem['loc'][0]}"
    if problem["type"] == "missing":
        raise Refused(key, "is missing", f"set it; the options are {', '.join(fields)}")
    if option not in fields:
        raise Refused(key, "is not an option", _suggest(option, fields))
    rule = problem["msg"][0].lower() + problem["msg"][1:]
    raise Refused(f"{key}={problem['input']!r}", rule, f"the options are {', '.join(fields)}")


def _suggest(wrong: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, if any is near, and all of them."""
    known = list(known)
    close = [name for name in known if wrong in name] or difflib.get_close_matches(wrong, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)


def _own_label(name: str) -> str:
    """`mine/reward.py` -> reward, `mine/reward.py:brief` and `package.module:brief` -> brief."""
    place, _, function = name.partition(":")
    return function or Path(place).stem
