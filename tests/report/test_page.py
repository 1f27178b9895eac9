"""The page of a report of two real runs, in headless Chromium. Not here: whether it is beautiful; look at it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from megapsft import cli
from megapsft.report.folders import Shown
from megapsft.report.page import page
from megapsft.report.run import AXES, Run
from tests.ranks import run_ranks
from tests.report.browser import Browser

ROOT = Path(__file__).parents[2]
MOST = 5_000_000  # bytes of a page
QUIET = ("log.progress=false", "log.tensorboard=false", "checkpoint.interval=0")
FEW = ("train.batch_size=8", "train.minibatch_size=4", "train.steps=4", "data.max_length=256", *QUIET)
EVALUATED = ("evaluate.interval=2", "evaluate.limit=2", "evaluate.n=2", "evaluate.max_tokens=4")
WIDE, NARROW = 1280, 360  # pixels
REMAINING = "everything-else-that-was-recorded"


@pytest.fixture(scope="module")
def report(tiny_data, tiny_models, tmp_path_factory) -> Path:
    """Of PSFT behind a warm-up, and of SFT; both answer a benchmark."""
    root = tmp_path_factory.mktemp("report")
    given = [f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}", f"evaluate.data=[{tiny_data}]", *FEW, *EVALUATED]
    for name, options in {"psft": ["train.sft_warmup_steps=2", "log.tokens=1"], "sft": []}.items():
        config = str(ROOT / "configs" / name / "tiny-qwen3-gsm8k.yaml")
        assert run_ranks(1, cli.main, ["train", config, *given, f"run.dir={root / 'runs' / name}", *options]) == [0]
    (command,) = re.findall(r"```bash\nmegapsft (.+)\n```", (ROOT / "docs" / "report.md").read_text())
    with contextlib.chdir(root):
        assert cli.main(command.split()) == 0
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def colours(png: bytes) -> int:
    """Of how many colours a picture is."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    return len(image.getcolors(maxcolors=image.width * image.height))


@pytest.mark.parametrize(("width", "dark"), [(WIDE, False), (NARROW, True)])
def test_every_section_is_seen_on_a_wide_page_and_on_a_phone(report, browser, width, dark):
    tab = browser.open(report, width=width, dark=dark)
    assert (tab.complaints, tab.requests) == ([], [report.as_uri()])
    assert tab.run("document.documentElement.scrollWidth") <= width
    sections = tab.run("[...document.querySelectorAll('section')].map(section => section.id)")
    assert sections == ["runs", "training", "tokens", "benchmarks", "speed-and-memory", REMAINING, "configs"]
    for section in sections:
        high = tab.run(f"document.querySelector('#{section}').getBoundingClientRect().height")
        assert high > 100, section
        assert colours(tab.picture(f"#{section}")) > 20, section
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(23, 24, 26)" if dark else "rgb(253, 253, 251)")


def test_every_figure_has_a_title_units_and_words(report, browser):
    found = browser.open(report).run("""[...document.querySelectorAll('figure')].map(figure => ({
        title: figure.querySelector('figcaption').textContent,
        words: [...figure.querySelectorAll('[role=img], [role=region]')].map(shown => shown.getAttribute('aria-label')),
        drawings: figure.querySelectorAll('svg, table').length,
        labels: [...figure.querySelectorAll('svg')].map(svg => svg.querySelectorAll('.label').length),
    }))""")
    assert len(found) > 15
    for figure in found:
        assert figure["title"], figure
        assert figure["drawings"] == len(figure["words"]) > 0, figure
        assert all(re.search(r"\d", words) and words.startswith(figure["title"]) for words in figure["words"]), figure
        assert all(labels >= 1 for labels in figure["labels"]), figure
    words = {figure["title"]: figure["words"][0] for figure in found}
    assert re.search(
        r"nats a token over updates\. psft: .* at 1, .* at 12.*sft: .* at 1, .* at 8", words["Negative log-likelihood"]
    )


def test_what_is_on_the_x_axes_is_switched_without_scripts(report, browser):
    tab = browser.open(report)
    assert "<script" not in report.read_text()
    seen = "[...document.querySelectorAll('.over')].filter(over => over.offsetHeight).map(over => over.className)"
    for axis in reversed(AXES):
        tab.run(f"document.querySelector('#axis-{axis}').click()")
        assert set(tab.run(seen)) == {f"over over-{axis}"}


def test_it_is_one_small_file_whose_links_lead_somewhere(report):
    text = report.read_text()
    assert len(text) < MOST
    assert "http" not in text
    assert "url(" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_ten_thousand_updates_of_six_runs_are_still_small_and_names_are_escaped():
    evil = "<img src=x onerror=alert(1)>\x1b"
    updates = [
        {
            "update": n,
            "step": n,
            "phase": "train",
            "objective": "psft",
            "data/samples": 8,
            "objective/nll": 1 / n,
            "policy/entropy": n % 7,
        }
        for n in range(1, 10_001)
    ]
    text = page(
        Shown(runs=[Run(name=f"{evil}{n}", colour=n, updates=updates, config={"run.dir": evil + str(n)}) for n in range(6)])
    )
    assert len(text) < MOST
    assert "<img" not in text
    assert "\x1b" not in text
