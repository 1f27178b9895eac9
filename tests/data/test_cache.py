"""Rows are tokenised once for all who ask for the same tokens, also at the same moment, and anew for who asks for others."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megapsft.config import DataConfig
from megapsft.data.arithmetic import generate, write_jsonl
from megapsft.data.cache import MANY_ROWS, cached, note_on_cache
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.demonstrations import load_demonstrations
from megapsft.errors import Refused
from tests.command import ROOT, its
from tests.data.conftest import CHATML
from tests.data.test_mapped import same

PROCESSES = 4
WAITS = "another process tokenises it"
START = """
import os, signal, sys, time
from pathlib import Path
from megapsft.config import DataConfig
from megapsft.data import mapped
from megapsft.data.cache import cached
from megapsft.data.chat_template import ChatTemplate
from megapsft.data.demonstrations import load_demonstrations

data, model, place = sys.argv[1:]
config = DataConfig(path=data, cache=place)

def load():
    print("loads", flush=True)
    time.sleep(1)  # the others come meanwhile
    return load_demonstrations(config, ChatTemplate.load(model), 512)
"""
HELD = START + """
import select
slow = load
load = lambda: (slow(), select.select([sys.stdin], [], [], 60))[0]
cached(load, config, Path(model), 512)
"""  # fmt: skip
AT_ONCE = START + "print(cached(load, config, Path(model), 512).response_tokens, flush=True)\n"
KILLED = START + """
write_array, written = mapped._write_array, []

def killed_in_the_third(*arguments):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write_array(*arguments))

mapped._write_array = killed_in_the_third
cached(load, config, Path(model), 512)
"""  # fmt: skip
FULL = START + """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails, as on a disk that is full
dataset = load()
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
cached(lambda: dataset, config, Path(model), 512)
"""  # fmt: skip


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ({"prompt": row["question"], "demonstration": row["answer"]} for row in generate(40, 0)))
    return path


@pytest.fixture
def model(model_dir) -> Path:
    return model_dir()


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "kept" / "tokens"


@pytest.fixture
def ask(data, model, place):
    """-> (data set, whether it was tokenised)."""

    def ask(vocab_size: int = 512, **options):
        config, loaded = DataConfig(**{"path": str(data), "cache": str(place), **options}), []

        def load():
            loaded.append(load_demonstrations(config, ChatTemplate.load(model), vocab_size))
            return loaded[0]

        found = cached(load, config, model, vocab_size)
        assert not loaded or same(found, loaded[0])
        return found, bool(loaded)

    return ask


@pytest.fixture
def begin(data, model, place):
    """Starts a script in a process of its own."""

    def begin(script: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", script, data, model, place]
        return subprocess.Popen(
            command, cwd=ROOT, env=its(environment), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return begin


def folders(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir())


def test_the_same_tokens_are_made_once(ask, place):
    first, loaded = ask()
    assert loaded
    again, loaded = ask()
    assert not loaded
    assert same(first, again)
    (name,) = folders(place)
    assert re.fullmatch(r"rows-[0-9a-f]{32}", name)


@pytest.mark.parametrize("options", [{"packing": False}, {"pack_length": 64}, {"micro_batch_size": 2}, {"shuffle": False}])
def test_what_comes_after_the_tokens_changes_nothing(options, ask):
    ask()
    _, loaded = ask(**options)
    assert not loaded


@pytest.mark.parametrize(
    "options", [{"max_length": 100}, {"overlong": "truncate"}, {"system_prompt": "Be brief."}, {"limit": 3}, {"vocab_size": 600}]
)
def test_other_options_are_other_tokens(options, ask, place):
    ask()
    _, loaded = ask(**options)
    assert loaded
    assert len(folders(place)) == 2


def in_place(path: Path) -> None:
    """Another word of the same length, at the same time of the file system."""
    before = path.stat()
    path.write_text(path.read_text().replace("dollars", "dinners", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 1))


@pytest.mark.parametrize("change", [in_place, touch, lambda path: path.write_text(path.read_text() + path.read_text())])
def test_another_file_is_other_tokens(change, ask, data):
    ask()
    change(data)
    found, loaded = ask()
    assert loaded
    assert found.rows == len(data.read_text().splitlines())


def test_another_chat_template_or_tokenizer_is_other_tokens(ask, model, model_dir):
    ask()
    model_dir(CHATML.replace("\n", " "))
    _, loaded = ask()
    assert loaded
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    _, loaded = ask()
    assert loaded


def test_those_who_come_at_once_wait_for_the_first(begin):
    started = [begin(AT_ONCE, RANK=str(rank)) for rank in range(PROCESSES)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES, said
    assert sum("loads" in out for out, _ in said) == 1
    assert len({out.splitlines()[-1] for out, _ in said}) == 1


def test_who_comes_second_says_that_it_waits_and_takes_what_the_first_made(ask, begin):
    held = begin(HELD)
    assert held.stdout.readline() == "loads\n"
    second, other_rank = begin(AT_ONCE), begin(AT_ONCE, RANK="3")
    assert any(WAITS in line for line in second.stderr)  # once it does
    held.communicate("\n", timeout=60)
    assert held.returncode == 0
    found, loaded = ask()
    assert not loaded
    for process in (second, other_rank):
        out, error = process.communicate(timeout=60)
        assert out == f"{found.response_tokens}\n"
        assert WAITS not in error  # the first rank has said it once, others say nothing


def test_a_killed_process_leaves_nothing_in_the_way(ask, begin, place):
    killed = begin(KILLED)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = folders(place)
    assert left.startswith(".rows-")
    _, loaded = ask()
    assert loaded
    (name,) = folders(place)
    assert name.startswith("rows-")


def test_a_full_disk_is_refused_and_nothing_is_left(begin, place):
    _, error = begin(FULL).communicate(timeout=60)
    assert f"Refused: data.cache={place}: cannot be written to ([Errno 27] File too large)" in error
    assert folders(place) == []


def test_refusals_of_the_rows_are_their_own_and_nothing_is_left(ask, data, place):
    data.write_text('{"prompt": " ", "demonstration": "5"}\n')
    with pytest.raises(Refused, match="blank"):
        ask()
    assert folders(place) == []
    data.unlink()
    with pytest.raises(Refused, match="is not a file"):
        ask()


def test_where_a_model_is_from_changes_nothing(ask, model):
    ask()
    for name in ("conversion.json", "model.safetensors.index.json"):
        (model / name).write_text("{}")
    _, loaded = ask()
    assert not loaded


def test_places_that_cannot_be_are_refused(ask, data):
    with pytest.raises(Refused, match=r"data.cache=: names no folder"):
        ask(cache="")
    with pytest.raises(Refused, match=r"data.cache=.*is a file"):
        ask(cache=str(data))
    with pytest.raises(Refused, match="lies under"):
        ask(cache=str(data / "kept"))


def test_prompts_are_not_kept(ask, place):
    with pytest.raises(Refused, match=r"data.cache=.*kind=prompts"):
        ask(kind="prompts")
    assert not place.exists()


def test_who_has_many_rows_and_ranks_is_told():
    without, with_one = DataConfig(), DataConfig(cache="kept")
    assert f"{MANY_ROWS:,} rows are tokenised and held by each of 8 processes" in note_on_cache(without, MANY_ROWS, 8)
    assert note_on_cache(without, MANY_ROWS, 1) is None
    assert note_on_cache(without, MANY_ROWS - 1, 8) is None
    assert note_on_cache(with_one, MANY_ROWS, 8) is None
    assert note_on_cache(DataConfig(kind="prompts"), MANY_ROWS, 8) is None
