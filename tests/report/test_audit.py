"""An audit on the terminal and as a page. Not here: whether the page is beautiful; look at it."""

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from megapsft.audit.across import Problem
from megapsft.audit.audit import Audit, audit
from megapsft.config import load_config
from megapsft.data.arithmetic import generate, preferences, write_jsonl
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.plan import Layout
from megapsft.report.audit import show_audit, visible
from megapsft.report.audit_page import page, write_page

LAYOUT = Layout(packing=True, pack_length=2048, micro_batch_size=1)


@pytest.fixture(scope="module")
def template(tiny_models):
    return ChatTemplate.load(tiny_models("qwen3"))


@pytest.fixture(scope="module")
def faulty(template, tmp_path_factory) -> Audit:
    """40 rows: 1 is cut, 3 has a <script> and a control character, 10 is row 4 again, 20 is of the evaluation."""
    rows = [{"prompt": row["question"], "demonstration": row["answer"]} for row in generate(40, 1)]
    rows[0]["demonstration"] = "Word " * 200
    rows[2]["prompt"] = "<script>alert(1)</script> \x1b[31m" + rows[2]["prompt"]
    rows[9] = rows[3]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    config = load_config(None, [f"data.path={path}", "data.max_length=300", "data.overlong=truncate", "objective.name=sft"])
    evaluation = (Problem(source="test.jsonl:1", text=rows[19]["prompt"]),)
    return audit(config, template, 307, LAYOUT, evaluation=evaluation, rows=8)


def printed(audit, **options):
    console = Console(file=io.StringIO(), highlight=False, **options)
    show_audit(audit, console)
    return console.file.getvalue()


def test_the_terminal_says_it_without_colours(faulty):
    text = printed(faulty, width=160)
    assert "\x1b" not in text  # neither our colours, as it is no terminal, nor what the file would do to one
    assert "40 of 40 go into training" in text
    for rule, row in (("truncated", 1), ("control-characters", 3), ("duplicate", 10), ("overlap", 20)):
        assert re.search(rf"^ *{rule} +1 +{row} *$", text, re.M), rule
    assert "row 10: as row 4" in text
    assert re.search(r"\{\+Word Word.*\+\}\{>.*<\|im_end\|><\}", text)  # trained, then cut
    assert "<U+001B>" in text
    assert "data.max_length=300" in text
    assert "8 of them are shown" in text


def test_the_terminal_says_it_in_colours(faulty):
    assert "\x1b[1;36m{+\x1b[0m" in printed(faulty, width=160, force_terminal=True, color_system="standard")


def test_no_warnings(template, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", preferences(generate(40, 1), 0))
    config = load_config(None, [f"data.path={tmp_path}/pairs.jsonl", "data.kind=preferences", "objective.name=dpo"])
    clean = audit(config, template, 307, LAYOUT, rows=1)
    assert "no warnings" in printed(clean, width=160)
    assert "chosen: trained" in printed(clean, width=160)
    assert "No rule found anything." in page(clean)
    assert printed(audit(config, template, 307, LAYOUT, rows=0), width=160).count("chosen: trained") == 0


class Reader(HTMLParser):
    """What stands in a page; fails where an element is not closed in turn."""

    VOID = ("meta", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.labels, self.classes, self.outside = [], [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.classes += found.get("class", "").split()
        self.labels += [found.get("aria-label", "")] if tag == "svg" else []
        self.outside += [value for key, value in attrs if key in ("src", "href") and not value.startswith(("#", "data:"))]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_needs_nothing(faulty, tmp_path):
    write_page(faulty, tmp_path / "deep" / "audit.html")
    text = (tmp_path / "deep" / "audit.html").read_text()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["audit.html"]
    found = Reader(text)
    assert found.outside == []
    assert "script" not in found.tags
    assert "http" not in text
    assert "url(" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "\x1b" not in text
    assert len(text) < 100_000
    assert all(words in text for words in ("prefers-color-scheme: dark", "width=device-width", 'lang="en"'))


def test_every_picture_of_the_page_has_a_title_units_and_words(faulty):
    found = Reader(page(faulty))
    assert found.tags.count("svg") == found.tags.count("figure") == found.tags.count("figcaption") == 5
    assert len(found.labels) == 5
    for label in found.labels:
        assert re.search(r"token|position", label)
        assert re.search(r"\d", label)
    assert any("data.max_length at 300" in label for label in found.labels)


def test_warnings_on_the_page_lead_to_their_rows(faulty):
    found = Reader(page(faulty))
    assert {"row-1", "row-3", "row-10", "row-20"} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert {"#row-1", "#row-3", "#row-10", "#row-20"} <= set(found.links)
    assert {"prompt", "trained", "truncated", "special"} <= set(found.classes)


def test_what_would_steer_a_terminal_is_spelt_out():
    assert visible("a\x1b[2J\r\u202eb\u200b\n\tc\u2028") == "a<U+001B>[2J<U+000D><U+202E>b<U+200B>\n\tc<U+2028>"
