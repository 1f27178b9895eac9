"""Runs with LoRA: only adapters change; merged exports, those of PEFT and what engines get are the policy, to the last bit.

Split invariance is in tests/invariants/test_lora.py, resuming in tests/checkpoint/test_dist.py.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megapsft import cli
from megapsft.checkpoint.export import export_adapter_of, export_run
from megapsft.checkpoint.hf import export_stream, read_config
from megapsft.checkpoint.weights.torch_dist import DistWeights
from megapsft.config import load_config
from megapsft.errors import Refused
from megapsft.models.adapters import trained_rules
from megapsft.parallel import initialize, shutdown
from megapsft.train.loop import train
from megapsft.train.plan import plan_run
from megapsft.train.start import start
from tests.invariants.measure import whole
from tests.ranks import run_ranks

SCALING = 8 / 4
QUIET = ("log.progress=false", "log.tensorboard=false", "checkpoint.async_save=false")
LORA = ("lora.rank=4", "lora.alpha=8")
KINDS = {
    "dense": ("qwen3", 1, ()),
    "experts": ("qwen3_moe", 2, ("parallel.expert_model_parallel_size=2", "parallel.use_distributed_optimizer=true")),
}


class Trained(NamedTuple):
    """A run, and what was found on its ranks."""

    folder: Path
    model: Path
    base: dict[str, torch.Tensor]  # beside the adapters
    adapters: dict[str, torch.Tensor]
    streamed: dict[str, torch.Tensor]  # to engines
    logits: torch.Tensor | None  # of `token_ids`


@pytest.fixture(scope="module")
def trained(tiny_models, tiny_data, tmp_path_factory):
    """kind -> a run of SFT, then PSFT."""
    root, made = tmp_path_factory.mktemp("lora"), {}

    def make(kind: str) -> Trained:
        if kind not in made:
            family, ranks, more = KINDS[kind]
            found = run_ranks(ranks, _train, options(tiny_models(family), tiny_data, root / kind, *more))[0]
            made[kind] = Trained(root / kind, tiny_models(family), *found)
        return made[kind]

    return make


def options(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}", f"data.path={data}", "data.columns.prompt=question", "data.columns.demonstration=answer",
        f"run.dir={run}", "model.dtype=float32", "objective.name=psft", "train.steps=1", "train.sft_warmup_steps=2",
        "train.sft_warmup_lr=1e-2", "train.batch_size=8", "train.minibatch_size=4", "optimizer.lr=1e-2", *LORA, *QUIET, *more,
    ]  # fmt: skip


def token_ids() -> torch.Tensor:
    return torch.randint(0, 307, (2, 24), generator=torch.Generator().manual_seed(1))


def _train(arguments: list[str]) -> tuple:
    config = load_config(None, arguments)
    plan = plan_run(config, int(os.environ["WORLD_SIZE"]))
    initialize(plan.mesh, config.parallel, config.train.seed)
    run = start(plan)
    train(run)
    policy, logits = run.policy, None
    base, adapters = (whole(policy, rules) for rules in (plan.family.parameters(plan.hf), trained_rules(plan.hf, config.lora)))
    streamed = {name: tensor for name, tensor in export_stream(policy.chunks, plan.hf) if tensor is not None}
    if plan.mesh.world_size == 1:
        ids, policy.head().request = token_ids(), None
        with torch.no_grad():
            logits = policy.gpt_models()[0].eval()(ids, torch.arange(24).expand_as(ids), None)[..., :307]
    shutdown()
    return base, adapters, streamed, logits


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_change_and_the_loss_falls(kind, trained):
    run = trained(kind)
    source = load_file(run.model / "model.safetensors")
    assert run.base.keys() == source.keys()
    assert all(torch.equal(run.base[name], source[name]) for name in source)
    moved = [name for name, tensor in run.adapters.items() if tensor.any()]  # B was zero
    assert set(run.adapters) - set(moved) <= {name for name in run.adapters if ".experts." in name}  # some of which saw no token
    assert len(moved) > 0.7 * len(run.adapters)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["objective/nll"] < records[0]["objective/nll"] - 0.05
    assert records[-2]["objective/ratio_max"] == records[-2]["objective/ratio_min"] == 1.0  # the first of a step of PSFT
    keys = DistWeights(run.folder / "checkpoints/latest", read_config(run.model), adapter=True).tensors.keys()
    assert keys == run.adapters.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_base_plus_scaled_product_bitwise_and_what_engines_get(kind, trained, tmp_path):
    run = trained(kind)
    export_run(run.folder, tmp_path / "merged")
    export_adapter_of(run.folder, tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    source, merged = (load_file(folder / "model.safetensors") for folder in (run.model, tmp_path / "merged"))
    assert adapter.keys() == run.adapters.keys()
    assert all(torch.equal(adapter[name], tensor) for name, tensor in run.adapters.items())
    assert merged.keys() == run.streamed.keys() == source.keys()
    for name, tensor in merged.items():
        a, b = (f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight" for half in "AB")
        expected = source[name] + SCALING * (adapter[b] @ adapter[a]) if a in adapter else source[name]
        assert torch.equal(tensor, expected), name
        assert torch.equal(tensor, run.streamed[name]), name
    against = run.folder / "checkpoints/latest"
    assert cli.main(["convert", "verify", "--hf", str(tmp_path / "merged"), "--against", str(against)]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_adapter_and_computes_what_the_policy_does(kind, trained, tmp_path):
    run = trained(kind)
    assert cli.main(["export", str(run.folder), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(run.model, attn_implementation="eager", dtype=torch.float32)
    before = base(token_ids()).logits
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model(token_ids()).logits
    assert (logits - before).abs().max() > 0.1
    if run.logits is not None:
        torch.testing.assert_close(run.logits, logits, atol=1e-4, rtol=0)
        unloaded = model.merge_and_unload().state_dict()
        assert all(torch.equal(unloaded[name], tensor) for name, tensor in run.streamed.items())
    else:
        export_run(run.folder, tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        torch.testing.assert_close(merged(token_ids()).logits, logits, atol=1e-4, rtol=0)


def test_a_base_that_is_gone_or_another_is_refused(trained, tiny_data, tmp_path):
    run = trained("dense")
    moved, folder = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(run.folder, folder, symlinks=True)
    shutil.copytree(run.model, moved)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(str(run.folder), str(folder)))
    assert plan_run(load_config(None, options(moved, tiny_data, folder)), 1).done_steps == 3  # it may have moved
    about = folder / "model/source.json"
    about.write_text(about.read_text().replace(str(run.model), str(tmp_path / "gone")))
    with pytest.raises(Refused, match="gone': is gone, and the checkpoint .* has adapters only; give --base"):
        export_run(folder, tmp_path / "out")
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "out"), "--base", str(moved)]) == 0
    content = load_file(moved / "model.safetensors")
    content["model.norm.weight"][0] += 1
    save_file(content, moved / "model.safetensors", metadata={"format": "pt"})
    message = "moved: has other weights than those that the adapters of .*step-00000003 were trained beside; name the folder"
    with pytest.raises(Refused, match=message):
        export_run(folder, tmp_path / "other", base=moved)
    replaced = tmp_path / "replaced"
    shutil.copytree(moved, replaced)
    config = (folder / "config.yaml").read_text().replace(str(run.model), str(replaced)).replace(str(run.folder), str(folder))
    (folder / "config.yaml").write_text(config)
    with pytest.raises(Refused, match="replaced: has other weights than those"):
        plan_run(load_config(None, options(replaced, tiny_data, folder)), 1)


def test_an_adapter_names_a_base_that_peft_can_load_or_the_export_says_so(trained, tmp_path):
    run = trained("dense")
    moved, folder = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(run.folder, folder, symlinks=True)
    shutil.copytree(run.model, moved)
    about = folder / "model/adapter/adapter_config.json"

    def export(name: str, recorded: str, **options: Path) -> tuple[str, list[str]]:
        about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": recorded}))
        warnings = export_adapter_of(folder, tmp_path / name, **options).warnings
        return json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"], warnings

    assert export("as-it-is", str(run.model)) == (str(run.model), [])
    gone = str(tmp_path / "nowhere")
    assert export("of-gone", gone) == (gone, [f"PEFT puts the adapters on {gone}, which is gone: name one with --base"])
    _, (warning,) = export("of-megatron", str(folder / "checkpoints/latest"))
    assert "latest, which is not a Hugging Face folder: name one with --base" in warning
    assert export("of-moved", gone, base=moved) == (str(moved), [])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(moved, attn_implementation="eager")
    peft.PeftModel.from_pretrained(loaded, tmp_path / "of-moved")
    with pytest.raises(Refused, match="as-it-is: holds adapters, and no model; name one that they are merged into"):
        read_config(tmp_path / "as-it-is")


def test_adapters_of_experts_that_peft_refuses_are_told(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained("experts").folder, folder, symlinks=True)
    assert export_adapter_of(folder, tmp_path / "all").warnings == []
    about = folder / "model/adapter/adapter_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"target_modules": ["v_proj", "up_proj"]}))
    (warning,) = export_adapter_of(folder, tmp_path / "one").warnings
    assert "PEFT 0.21 refuses adapters of one of them: export merged weights, without --adapter" in warning


def test_what_export_says_of_adapters_where_there_are_none(trained, tmp_path, capsys):
    run = trained("dense")
    assert cli.main(["export", str(run.folder), "--out", str(tmp_path / "out"), "--adapter", "--dtype", "bf16"]) == 2
    assert "--dtype bf16: is of merged weights" in capsys.readouterr().err
    full = tmp_path / "full"
    shutil.copytree(run.folder, full, symlinks=True)
    state = full / "checkpoints/latest/state.json"
    state.write_text(json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != "base"}))
    for arguments, rule in ((["--adapter"], "has no adapters: it trained all"), (["--base", "x"], "is for runs with LoRA")):
        assert cli.main(["export", str(full), "--out", str(tmp_path / "out"), *arguments]) == 2
        assert rule in capsys.readouterr().err


def test_a_checkpoint_is_continued_as_what_it_is_also_where_nothing_else_says_so(trained, tiny_data, tmp_path):
    run, folder = trained("dense"), tmp_path / "run"
    shutil.copytree(run.folder, folder, symlinks=True)
    (folder / "config.yaml").unlink()
    as_lora = options(run.model, tiny_data, folder)
    plan_run(load_config(None, as_lora), 1)
    with pytest.raises(Refused, match=r"lora.rank=null: does not fit .* holds adapters alone"):
        plan_run(load_config(None, [option for option in as_lora if option not in LORA]), 1)
    state = next((folder / "checkpoints").glob("step-*3")) / "state.json"
    state.write_text(json.dumps({key: value for key, value in json.loads(state.read_text()).items() if key != "base"}))
    with pytest.raises(Refused, match=r"lora.rank=4: does not fit .* holds a whole model"):
        plan_run(load_config(None, as_lora), 1)
