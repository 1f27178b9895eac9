"""The process in which rewards are computed that may not return: one request a line, one reply a line, both JSON.

    {"load": target, "positional": 3, "options": {...}}  ->  {"value": 0.0}: it can be called so
    {"call": target, "arguments": [...], "options": {...}}  ->  {"value": 1.0}
    either  ->  {"error": "ValueError: ... (file, line 3)"}

A target is `package.module:function` or `folder/file.py:function`. Imports nothing that a target does not import.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from megapsft.platform.launch import die_with_launcher

OUT_OF_MEMORY = 77  # exit code

Functions = dict[str, Callable[..., Any]]


def main() -> None:
    """Answer requests until there are no more, or the parent ends."""
    die_with_launcher()
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # the pipes are kept to ourselves: what a reward prints goes to stderr. Nothing closes `replies` before the process has ended
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    functions: Functions = {}
    for line in requests:
        try:
            reply: dict[str, Any] = {"value": _answer(json.loads(line), functions, memory_bytes)}
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            reply = {"error": _said(error)}
        os.write(replies, json.dumps(reply).encode() + b"\n")


def _answer(request: Mapping[str, Any], functions: Functions, memory_bytes: int) -> float:
    if "call" in request:
        return _number(functions[request["call"]](*request["arguments"], **request["options"]))
    _limit_memory(None)
    function = functions[request["load"]] = _load(request["load"])
    inspect.signature(function).bind(*[None] * request["positional"], **request["options"])
    _limit_memory(memory_bytes)
    return 0.0


def _load(target: str) -> Callable[..., Any]:
    place, _, name = target.rpartition(":")
    if not place.endswith(".py"):
        return getattr(import_module(place), name)
    module_name = f"megapsft_reward_{Path(place).stem}"
    spec = spec_from_file_location(module_name, place)
    module = sys.modules[module_name] = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, name)


def _limit_memory(beyond: int | None) -> None:
    """Of address space, so many bytes beyond what is in use now; None lifts the limit (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = most if beyond is None else pages * resource.getpagesize() + beyond
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _number(value: Any) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"returned {type(value).__name__}, not a number")
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"returned {value}, which is not finite")
    return value


def _said(error: BaseException) -> str:
    """One line: what was raised, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error)[:500].split())
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}, line {last.lineno})"


if __name__ == "__main__":
    main()
