"""Programs that live in an environment of their own: which interpreter has them."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from megapsft.errors import Refused

HOME = Path(__file__).resolve().parents[2]  # the clone


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A program, and where to look for it."""

    name: str  # for people
    module: str  # what it is imported as
    target: str  # of the Makefile, which installs it into .venv-<target>
    variable: str  # environment variable that names its interpreter
    wanted: str  # what asks for it
    key: str | None = None  # of the config, which goes before all of these

    def find_python(self, configured: str | None = None) -> Path:
        """The interpreter that has it: the configured one, that of the environment variable, of .venv-<target>, or this one.

        Raises:
            Refused: none has it, or what was named is none.
        """
        for name, wanted in ((self.key, configured), (self.variable, os.environ.get(self.variable))):
            if wanted:
                path = Path(wanted).expanduser()
                if not os.access(path, os.X_OK):
                    remedy = f"name bin/python of an environment that has {self.target}"
                    raise Refused(f"{name}={wanted}", "is not an interpreter", remedy)
                return path
        for folder in (Path.cwd(), HOME):
            path = folder / f".venv-{self.target}" / "bin" / "python"
            if path.is_file():
                return path
        if importlib.util.find_spec(self.module) is not None:
            return Path(sys.executable)
        named = f"{self.key}=... or {self.variable}=..." if self.key else f"{self.variable}=..."
        remedy = f"run `make {self.target}`, or name an interpreter that has it: {named}"
        raise Refused(self.wanted, f"{self.name} is not installed", remedy)


__all__ = ["Elsewhere"]
