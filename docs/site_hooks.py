"""What mkdocs does beside: README.md and CONTRIBUTING.md are pages too, formulas become MathML, files of the source are named.

All of it happens as the site is built; no page needs a network or a script of somebody else's.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
NAMED_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that lie beside docs/ rather than in it."""
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are between pages of the site; to other files of the source, only their names."""
    source = next((name for name, of_site in FROM_ROOT.items() if of_site == page.file.src_uri), f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        of_source = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        of_site = FROM_ROOT.get(of_source, of_source.removeprefix("docs/"))
        if files.get_file_from_path(of_site) is None:
            if not (ROOT / of_source).exists():
                return found[0]  # which mkdocs complains of
            return text if of_source in text or target.endswith(text.strip("`")) else f"{text} (`{of_source}`)"
        return f"[{text}]({posixpath.relpath(of_site, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return NAMED_LINK.sub(link, markdown)


def on_page_content(html: str, **of_page: object) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    return FORMULA.sub(lambda found: mathml(found[2], block=found[1] == "div"), html)


def mathml(latex: str, block: bool) -> str:
    for entity, character in ENTITIES.items():
        latex = latex.replace(entity, character)
    return convert(latex, display="block" if block else "inline")
