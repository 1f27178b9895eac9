"""What the converters refuse, and how they say it: the value, the rule, the remedy; exit code 2, and nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megapsft.checkpoint.convert import run
from megapsft.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megapsft.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megapsft.checkpoint.convert.workers import Options
from megapsft.checkpoint.files.torch_dist import read_metadata
from megapsft.checkpoint.unfinished import Unfinished
from megapsft.cli import main
from megapsft.errors import Refused
from tests.checkpoint.convert.folders import INDEX, assert_same_tensors, make_dense, make_model, partial_of

MODEL = "model.safetensors"
AGAIN = "; download or copy the folder again"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Never write into them."""
    root = tmp_path_factory.mktemp("models")
    made = {name: make_model(name, root / name) for name in ("qwen3", "qwen3-tied", "qwen2")}
    made["shards"] = make_model("qwen3", root / "shards", shards=True)
    hf_to_megatron(made["qwen3"], root / "converted")
    made["converted"] = root / "converted"
    return made


@pytest.fixture
def copied(models, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(models[name], tmp_path / name))


def refused(capsys, *arguments: object) -> str:
    """What `megapsft convert ...` says when it refuses; that it says nothing else, and how it ends."""
    capsys.readouterr()
    assert main(["convert", *(str(argument) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip()


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def edit_tensors(folder: Path, edit: Callable[[dict], object]) -> None:
    tensors = load_file(folder / MODEL)
    edit(tensors)
    save_file(tensors, folder / MODEL)


def edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def shorten(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def other_config(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["Qwen2ForCausalLM"])


def a_pickle(folder: Path) -> None:
    (folder / MODEL).rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"
BAD_SOURCES = {  # what is done to which model, and what is said then
    "missing shard": ("shards", lambda f: shard(f).unlink(), "is missing, but {f}/" + INDEX + " lists it" + AGAIN),
    "truncated shard": ("shards", lambda f: shorten(shard(f), 1), "is truncated or not safetensors (the tensors take"),
    "shard cut to nothing": ("shards", lambda f: shorten(shard(f), shard(f).stat().st_size), "is truncated or not safetensors"),
    "wrong shape": (
        "qwen3",
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(63)})),
        f"{NORM}: has shape [63], but config.json makes it [64]; name the checkpoint that belongs to this config.json",
    ),
    "transposed": (
        "qwen3",
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].t().contiguous()})),
        "lm_head.weight: has shape [64, 131], but config.json makes it [131, 64]",
    ),
    "extra tensor": (
        "qwen3",
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.4.x": torch.ones(1)})),
        "checkpoint: 1 tensors are not part of the model that config.json describes: model.layers.4.x; name the checkpoint that",
    ),
    "missing tensor": (
        "qwen3",
        lambda f: edit_tensors(f, lambda t: t.pop(NORM)),
        f"checkpoint: 1 tensors are missing that config.json asks for: {NORM}; download it again, or name the checkpoint that",
    ),
    "listed but absent": (
        "shards",
        lambda f: edit_index(f, lambda m: m.update(ghost=shard(f).name)),
        f"lacks tensors that {INDEX} lists in it: ghost{AGAIN}",
    ),
    "there but not listed": (
        "shards",
        lambda f: edit_index(f, lambda m: m.pop(NORM)),
        f"has tensors that {INDEX} does not list in it: {NORM}{AGAIN}",
    ),
    "path traversal": (
        "shards",
        lambda f: edit_index(f, lambda m: m.update({NORM: "../qwen3/" + MODEL})),
        f"{INDEX}: names ../qwen3/{MODEL}, which is not in its folder{AGAIN}",
    ),
    "absolute path": ("shards", lambda f: edit_index(f, lambda m: m.update({NORM: "/etc/passwd"})), "names /etc/passwd, which"),
    "index of numbers": ("shards", lambda f: edit_index(f, lambda m: m.update({NORM: 3})), "has no weight_map of tensors"),
    "index without a map": ("shards", lambda f: (f / INDEX).write_text("{}"), "has no weight_map of tensors to files" + AGAIN),
    "index is no JSON": ("shards", lambda f: (f / INDEX).write_text("{"), f"{INDEX}: is not readable JSON"),
    "unknown architecture": (
        "qwen3",
        lambda f: edit_json(f / "config.json", architectures=["MambaForCausalLM"]),
        "MambaForCausalLM",
    ),
    "config of another model": ("qwen3", other_config, "tensors are missing that config.json asks for: model.layers.0.self_attn"),
    "config of more layers": (
        "qwen2",
        lambda f: edit_json(f / "config.json", num_hidden_layers=5),
        "12 tensors are missing that",
    ),
    "no config": ("qwen3", lambda f: (f / "config.json").unlink(), "config.json: is missing; name a complete Hugging Face model"),
    "pickle": (
        "qwen3",
        a_pickle,
        "pytorch_model.bin: is a pickle, which can run code when it is read; only safetensors are; convert",
    ),
    "no weights": ("qwen3", lambda f: (f / MODEL).unlink(), f"has neither {MODEL} nor {INDEX}; name a folder with the weights"),
    "no folder": ("qwen3", shutil.rmtree, "is not a folder; name a local folder with config.json and *.safetensors"),
    "several dtypes": (
        "qwen3",
        lambda f: edit_tensors(f, lambda t: t.update({NORM: t[NORM].bfloat16()})),
        "stores tensors in several dtypes (bfloat16, float32); give --dtype, such as --dtype bf16",
    ),
    "a dtype of no model": (
        "qwen3",
        lambda f: edit_tensors(f, lambda t: t.update({NORM: t[NORM].long()})),
        f"{NORM}: is stored as I64, which no model here has; use the checkpoint in bfloat16",
    ),
    "tied but different": (
        "qwen3-tied",
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "lm_head.weight: differs from model.embed_tokens.weight, but config.json ties them; set tie_word_embeddings to false",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_refused(case, copied, tmp_path, capsys):
    name, damage, message = BAD_SOURCES[case]
    folder = copied(name)
    damage(folder)
    before = sorted(tmp_path.iterdir())
    assert message.replace("{f}", str(folder)) in refused(capsys, "hf-to-megatron", "--hf", folder, "--out", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def release(folder: Path) -> Path:
    return folder / "release"


def edit_metadata(folder: Path, edit: Callable[[object], object]) -> None:
    found = read_metadata(release(folder))
    edit(found)
    (release(folder) / ".metadata").write_bytes(pickle.dumps(found))


class Calls:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def called(folder: Path) -> Path:
    return folder.parent / "called"


def malicious_metadata(folder: Path) -> None:
    edit_metadata(folder, lambda found: setattr(found, "planner_data", Calls(called(folder))))


def malicious_record(folder: Path) -> None:
    """The record of one norm calls something when it is unpickled."""
    torch.save([torch.ones(64), Calls(called(folder))], release(folder) / "__0_9.distcp")
    size = (release(folder) / "__0_9.distcp").stat().st_size

    def edit(found):
        info = next(info for place, info in found.storage_data.items() if place.fqn == "decoder.final_layernorm.weight")
        info.relative_path, info.offset, info.length = "__0_9.distcp", 0, size

    edit_metadata(folder, edit)


def to_elsewhere(folder: Path) -> None:
    edit_metadata(folder, lambda found: setattr(next(iter(found.storage_data.values())), "relative_path", "../../x.distcp"))


def less(key: str):
    """The checkpoint without a tensor."""

    def edit(found):
        found.state_dict_metadata.pop(key)
        for place in [place for place in found.storage_data if place.fqn == key]:
            found.storage_data.pop(place)

    return lambda folder: edit_metadata(folder, edit)


def lose_a_chunk(found):
    place = next(place for place in found.storage_data if place.fqn == "decoder.layers.self_attention.linear_qkv.weight")
    found.storage_data.pop(place)
    entry = found.state_dict_metadata[place.fqn]
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets != place.offset]


DATA = "release/__0_1.distcp"
COPY = "; copy the checkpoint again"
BAD_CHECKPOINTS = {
    "missing .distcp": (lambda f: (f / DATA).unlink(), f"{DATA}: is missing, but .metadata lists it{COPY}"),
    "truncated .distcp": (lambda f: shorten(f / DATA, 1), "it is truncated" + COPY),
    "zeros for a record": (lambda f: (f / DATA).write_bytes(bytes((f / DATA).stat().st_size)), "holds a damaged record at byte"),
    "a chunk is lost": (lambda f: edit_metadata(f, lose_a_chunk), "linear_qkv.weight: is covered by its chunks for"),
    "a parameter is lost": (less("decoder.final_layernorm.weight"), "lacks 1 parameters of Qwen3ForCausalLM: decoder.final_la"),
    "config of another model": (
        other_config,
        "lacks 4 parameters of Qwen2ForCausalLM: decoder.layers.0.self_attention.linear_qkv",
    ),
    "config of a smaller model": (
        lambda f: edit_json(f / "config.json", architectures=["LlamaForCausalLM"]),
        "holds 2 parameters that LlamaForCausalLM does not have: decoder.layers.self_attention.q_layernorm.weight, decoder.laye",
    ),
    "config of more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=5), "but config.json makes it [5, "),
    "config of a larger vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=132), "but config.json makes it [132, "),
    "half a checkpoint": (lambda f: (f / "release/.metadata").unlink(), "is not a whole torch_dist checkpoint (no .metadata)"),
    "no such iteration": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("last"),
        "latest_checkpointed_iteration.txt: holds 'last', which is no iteration; write the number of a checkpoint to it, or rel",
    ),
    ".metadata calls os.system": (malicious_metadata, ".system when it is read, which no checkpoint needs; read it with the pro"),
    "a record calls os.system": (
        malicious_record,
        ".system when it is read, which no checkpoint needs; read it with the program",
    ),
    "path traversal": (to_elsewhere, "names ../../x.distcp, which is not in the folder"),
    "no folder": (shutil.rmtree, "is not there; "),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused(case, copied, tmp_path, capsys):
    damage, message = BAD_CHECKPOINTS[case]
    folder = copied("converted")
    damage(folder)
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, "megatron-to-hf", "--megatron", folder, "--out", tmp_path / "out")
    assert not called(folder).exists()
    left = {partial_of(tmp_path / "out")} if case in WHILE_COPYING else set()
    assert set(tmp_path.iterdir()) - left == set(before)


WHILE_COPYING = ("zeros for a record", "a record calls os.system")  # what was written before may be gone on with


def test_the_common_state_is_not_even_read(copied, models, tmp_path):
    folder = copied("converted")
    torch.save({"args": Calls(called(folder))}, release(folder) / "common.pt")
    megatron_to_hf(folder, tmp_path / "out")
    assert not called(folder).exists()
    assert_same_tensors(tmp_path / "out", models["qwen3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "1MiB"], "max_memory=1MiB: is not enough: this conversion needs "),
        (["--max-memory", "much"], "size 'much': is not a number of bytes; write for example 600MiB or 5GB"),
        (["--max-memory", "5I"], "size '5I': is not a number of bytes"),
        (["--max-memory", "-3GB"], "size '-3GB': is not a number of bytes"),
        (["--workers", "0"], "workers=0: must be 1 or more; use 4"),
    ],
)
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_bad_options_are_refused(direction, options, message, models, tmp_path, capsys):
    source = ["--hf", models["qwen3"]] if direction == "hf-to-megatron" else ["--megatron", models["converted"]]
    assert message in refused(capsys, direction, *source, "--out", tmp_path / "out", *options)
    assert not any(tmp_path.iterdir())


def test_how_much_memory_is_enough_is_said(models, tmp_path, capsys):
    said = refused(capsys, "hf-to-megatron", "--hf", models["qwen3"], "--out", tmp_path / "out", "--max-memory", "1MiB")
    enough = said.split("use --max-memory ")[1].split()[0]
    assert (
        main(
            ["convert", "hf-to-megatron", *("--hf", str(models["qwen3"]), "--out", str(tmp_path / "out")), "--max-memory", enough]
        )
        == 0
    )


@pytest.mark.parametrize("taken", ["file", "folder", "a file above"])
def test_a_target_that_exists_is_refused_and_left_alone(taken, models, tmp_path, capsys):
    out = tmp_path / "out"
    if taken == "folder":
        out.mkdir()
        (out / "mine").write_text("kept")
    else:
        out.write_text("kept")
    where = out / "below" if taken == "a file above" else out
    rule = "lies under a file" if taken == "a file above" else "exists and is not an empty folder; name another folder, or delete"
    for arguments in (["hf-to-megatron", "--hf", models["qwen3"]], ["megatron-to-hf", "--megatron", models["converted"]]):
        assert rule in refused(capsys, *arguments, "--out", where)
    assert (out / "mine" if taken == "folder" else out).read_text() == "kept"
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_and_a_link_to_a_new_one_are_taken(models, tmp_path):
    (tmp_path / "empty").mkdir()
    hf_to_megatron(models["qwen3"], tmp_path / "empty")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    hf_to_megatron(models["qwen3"], tmp_path / "link")
    assert (tmp_path / "disk" / "out" / "release" / ".metadata").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "disk", "link"}


def test_a_mount_point_is_refused_before_anything_is_written(models, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(Refused, match="is a mount point, which a finished folder cannot replace; name a folder in it, such as"):
        hf_to_megatron(models["qwen3"], tmp_path / "volume")
    assert list(tmp_path.iterdir()) == [tmp_path / "volume"]


def test_a_name_that_is_taken_at_the_end_loses_nothing(tmp_path):
    unfinished = Unfinished(tmp_path / "out")
    (unfinished.folder / "weights").write_text("whole")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("kept")
    with pytest.raises(Refused, match=rf"make room for it, and rename {unfinished.folder}, which is complete"):
        unfinished.finish()
    assert (unfinished.folder / "weights").read_text() == "whole"


@pytest.mark.parametrize("where", ["/proc/out", "/proc/self/out", "/sys/out"])
def test_a_place_that_cannot_be_written_to_is_refused(where, models, capsys):
    """Permissions do not stop root; these file systems do."""
    said = refused(capsys, "hf-to-megatron", "--hf", models["qwen3"], "--out", where)
    assert ": cannot be written to (" in said
    assert said.endswith("; name a place where you may write")


def test_a_disk_without_room_is_refused_before_anything_is_written(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    said = refused(capsys, "hf-to-megatron", "--hf", models["qwen3"], "--out", tmp_path / "out")
    assert re.search(rf"the disk of {tmp_path}: has [\d.]+ kB free; [\d.]+ [kM]B more are needed; free some space, or", said)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_full_is_refused(models, tmp_path):
    """A small disk where we may mount one, a limit on files elsewhere; in a process of its own, which takes both with it."""

    def work() -> str:
        folder = tmp_path / "disk"
        folder.mkdir()
        if not mounted(folder, "size=1m"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        run.shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**12)  # as if another took what was free
        with pytest.raises(Refused) as refusal:
            hf_to_megatron(make_dense(tmp_path / "hf", 4), folder / "out")
        assert not any(folder.iterdir())
        return str(refusal.value)

    said = in_child(work)
    assert "__0_1.distcp: cannot grow: " in said
    assert said.endswith("; free some space, or write to another disk; run the same command again to go on from here")


def mounted(folder: Path, options: str) -> bool:
    """Put a tmpfs there, for this process alone, if that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x00020000, 0x10000000, 0x44000
    if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
        return False
    libc.mount(b"none", b"/", None, private, None)
    return libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, options.encode()) == 0


def in_child(work: Callable[[], str]) -> str:
    """What it returns in a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.write(writer, work().encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.parametrize("what", ["write_manifest", "plan.finish", "target.sync"])
def test_a_disk_that_fills_up_on_the_way_is_refused_and_gone_on_with(what, models, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if what == "write_manifest":
            patch.setattr(run, "write_manifest", full)
        elif what == "plan.finish":
            patch.setattr("megapsft.checkpoint.convert.hf_to_megatron.write_config", full)
        else:
            patch.setattr("megapsft.checkpoint.files.direct.os.fdatasync", full)
        with pytest.raises(Refused, match="cannot grow: No space left on device; free some space, or write to another disk"):
            hf_to_megatron(models["qwen3"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = hf_to_megatron(models["qwen3"], tmp_path / "out")
    assert result.resumed == (0 if what == "target.sync" else result.tensors)
    megatron_to_hf(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", models["qwen3"])


def test_numbers_that_are_not_finite_are_converted_warned_of_and_counted(copied, tmp_path, capsys):
    folder = copied("qwen3")

    def spoil(tensors):
        tensors[NORM][:2], tensors[NORM][5] = float("nan"), float("-inf")
        tensors["lm_head.weight"][130, 63] = float("inf")

    edit_tensors(folder, spoil)
    assert main(["convert", "hf-to-megatron", "--hf", str(folder), "--out", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert f"megapsft: warning: {NORM} has 3 numbers that are infinite or not a number" in err
    assert "megapsft: warning: lm_head.weight has 1 numbers that are infinite or not a number" in err
    tensors = json.loads((tmp_path / "out" / "conversion.json").read_text())["tensors"]
    assert {name: entry["nonfinite"] for name, entry in tensors.items() if "nonfinite" in entry} == {NORM: 3, "lm_head.weight": 1}
    megatron_to_hf(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", folder)


def test_numbers_too_large_for_the_dtype_are_counted_as_they_are_written(copied, tmp_path):
    folder = copied("qwen3")
    edit_tensors(folder, lambda tensors: tensors[NORM].__setitem__(slice(0, 3), 1e6))
    assert hf_to_megatron(folder, tmp_path / "out", "fp16").nonfinite == {NORM: 3}


def test_a_model_without_a_tokenizer_is_converted_and_warned_of(models, tiny_models, tmp_path):
    result = hf_to_megatron(models["qwen3"], tmp_path / "out")
    assert result.warnings == [
        f"{models['qwen3']} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json), so the result has none: "
        "put one beside its config.json"
    ]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["companions"] == ["generation_config.json"]
    assert len(megatron_to_hf(tmp_path / "out", tmp_path / "back").warnings) == 1

    whole = Path(shutil.copytree(tiny_models("qwen3"), tmp_path / "whole"))
    result = hf_to_megatron(whole, tmp_path / "with")
    assert result.warnings == []
    assert "tokenizer.json" in json.loads((tmp_path / "with" / "conversion.json").read_text())["companions"]
    (whole / "chat_template.jinja").unlink()
    [warning] = hf_to_megatron(whole, tmp_path / "without").warnings
    assert warning.startswith(f"{whole} has no chat template, so the result has none: put a chat_template.jinja beside")


def test_what_was_written_and_reads_back_otherwise_is_refused(models, tmp_path, monkeypatch):
    from megapsft.checkpoint.files.direct import Target

    plain = Target.write

    def with_one_bit_wrong(self, offset, data):
        if len(data) == 131 * 64 * 4:  # an embedding
            data = data.clone()
            data[77] ^= 4
        plain(self, offset, data)

    monkeypatch.setattr(Target, "write", with_one_bit_wrong)
    with pytest.raises(Refused, match="weight: is not what was written a moment ago; trust neither this disk nor this memory"):
        hf_to_megatron(models["qwen3"], tmp_path / "out", options=Options(read_back=True))
    assert not any(tmp_path.iterdir())
