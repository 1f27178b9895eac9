"""The site: it builds without a warning, and what its pages name is there: messages, options, keys.

Not here: that its commands run (tests/test_docs.py), and how it looks.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from functools import cache
from pathlib import Path

import pytest

from megapsft.cli import COMMANDS, CONVERT
from megapsft.config import Config, flatten

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SOURCES = [*(ROOT / "megapsft").rglob("*.py"), *(ROOT / "launchers").rglob("*")]


def test_it_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # --strict: a warning ends it
    first = re.sub(r"<[^>]+>", "", (tmp_path / "site/index.html").read_text())
    assert "make quickstart" in first
    psft = (tmp_path / "site/psft.html").read_text()
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in psft
    assert "arithmatex" not in psft
    for page in (tmp_path / "site").rglob("*.html"):
        assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\" >]+)", page.read_text()) == [], page


def test_the_page_of_commands_is_what_would_be_generated():
    code = "import sys; sys.path.insert(0, 'docs'); import commands; print(commands.page(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs/commands.md").read_text(), "run make docs"


def invocations() -> list[tuple[str, str]]:
    """(page, command with its options) wherever a page calls megapsft: in blocks, and in words."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        found += [(page.name, match) for match in re.findall(r"(?:^|`|\$ )(megapsft [a-z][^`\n]*)", text, re.M)]
    return found


def test_no_page_names_a_command_or_an_option_that_is_not_there():
    known = {name: {flag(parameter) for parameter in parameters_of(function)} for name, function in all_commands()}
    seen = 0
    for page, line in invocations():
        words = line.split()[1:]
        name = " ".join(words[:2]) if words[0] == "convert" and len(words) > 1 else words[0]
        if name == "convert" or name.startswith("convert -"):
            continue
        assert name.rstrip(".,;:)") in known, f"{page}: {line}"
        for option in re.findall(r" (--[a-z][a-z0-9-]*)", line):
            assert option in known[name] | {"--help"}, f"{page}: {line}"
            seen += 1
    assert seen > 50


def all_commands():
    for name, function in COMMANDS.items():
        yield from ((f"convert {kind}", one) for kind, one in CONVERT.items()) if name == "convert" else [(name, function)]


def parameters_of(function) -> list[str]:
    hints = typing.get_type_hints(function)
    names = []
    for parameter in inspect.signature(function).parameters:
        group = hints[parameter]
        names += [field.name for field in dataclasses.fields(group)] if dataclasses.is_dataclass(group) else [parameter]
    return names


def flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


@cache
def words_of(path: Path) -> str:
    """A source without quotes and line breaks inside its strings, in which a message can be found whole."""
    text = path.read_text() if path.is_file() else ""
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def messages() -> list[str]:
    table = (ROOT / "docs/troubleshooting.md").read_text()
    return [found for found in re.findall(r"^\| `([^`]+)` \|", table, re.M)]


def test_there_are_messages():
    assert len(messages()) > 30


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_of_ours(message):
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(r"[^\n]{1,120}?".join(parts))
    assert any(pattern.search(words_of(path)) for path in SOURCES), message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_key_that_is_not_there(page):
    known = flatten(Config())
    sections = {key.split(".")[0] for key in known} - {"objective", "rewards"}
    for key in re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_]+(?:\.[a-z_]+)*)(?:=[^`]*)?`", page.read_text()):
        if not key.endswith((".py", ".md", ".json", ".jsonl", ".yaml")):
            assert key in known or any(other.startswith(key + ".") for other in known), key
