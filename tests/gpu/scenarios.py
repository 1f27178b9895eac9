"""What is measured of Transformer Engine's layers: python -m tests.gpu.scenarios OUT.json [--standin] '[["name", {...}], ...]'

A process of its own, as a world of one rank lives in it. On a GPU the layers are the real ones; with --standin they are those of
tests/gpu/standin on a CPU, so that all of this has run before a GPU is there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STANDIN = Path(__file__).parent / "standin"

if __name__ == "__main__" and "--standin" in sys.argv:
    sys.path.insert(0, str(STANDIN))  # before Megatron looks for it

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

from megapsft.checkpoint.hf import import_hf, read_config  # noqa: E402
from megapsft.config import Config, load_config  # noqa: E402
from megapsft.data.pack import pack  # noqa: E402
from megapsft.data.plan import Layout  # noqa: E402
from megapsft.models.families import family_of  # noqa: E402
from megapsft.parallel import initialize, plan_mesh, shutdown  # noqa: E402
from megapsft.platform.compat import hush  # noqa: E402
from megapsft.platform.launch import become_world_of_one  # noqa: E402
from megapsft.platform.machine import Machine  # noqa: E402
from megapsft.policy import build  # noqa: E402
from megapsft.policy.build import Policy, build_chunks, distribute, half, model_shape, transformer_config  # noqa: E402
from megapsft.policy.forward import evaluate, forward_backward, read  # noqa: E402
from megapsft.policy.generate import InProcess  # noqa: E402
from megapsft.rollout.base import Request, Sampling  # noqa: E402
from megapsft.train import plan  # noqa: E402
from megapsft.train.fp8 import alignment  # noqa: E402
from megapsft.train.plan import plan_run  # noqa: E402
from megapsft.train.prepare import with_constants  # noqa: E402
from megapsft.train.run import Run  # noqa: E402
from megapsft.train.start import start  # noqa: E402
from megapsft.train.update import update  # noqa: E402
from megapsft.types import Minibatch, Sample  # noqa: E402

LENGTHS = (13, 48, 35, 7)
HOPPER = Machine(capability=(9, 0), cuda=(13, 0), transformer_engine=(2, 19))


def names(folder: str, options: list[str]) -> dict[str, Any]:
    """Parameters and modules of the layers as Megatron builds them."""
    policy = _policy(folder, options)
    (gpt,) = policy.gpt_models()
    return {
        "parameters": [[name, list(parameter.shape)] for name, parameter in gpt.named_parameters()],
        "modules": {name: type(module).__name__ for name, module in gpt.decoder.layers[0].named_modules() if name},
    }


def agreement(folder: str, options: list[str]) -> dict[str, float]:
    """Log-probabilities of packed rows: differences to those of transformers in fp32, and what bfloat16 costs transformers."""
    policy, samples = _policy(folder, options), _samples(read_config(folder).vocab_size)
    found = _logprobs(policy, _minibatch(samples, policy, options, packing=True))
    expected, rounded = (_of_transformers(folder, samples, dtype) for dtype in (torch.float32, torch.bfloat16))
    return _differences(found, expected) | {"mean_of_transformers": float((rounded - expected).abs().mean())}


def packed(folder: str, options: list[str]) -> dict[str, float]:
    """A pack against each of its sequences alone: log-probabilities, and the gradient of their sum, relative."""
    policy, samples = _policy(folder, options, trained=True), _samples(read_config(folder).vocab_size)
    both = [_minibatch(samples, policy, options, packing) for packing in (True, False)]
    logprobs = [_logprobs(policy, minibatch) for minibatch in both]
    gradients = [_gradient(policy, minibatch) for minibatch in both]
    relative = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    return _differences(*logprobs) | {"gradient": relative, "gradient_norm": float(gradients[1].norm())}


def products(folder: str, options: list[str], tokens: int = 64) -> dict[str, dict[str, float]]:
    """Errors of each kind of linear module of a layer against fp64, relative: of the output and of both gradients."""
    from megatron.core.fp8_utils import get_fp8_context

    policy = _policy(folder, options)
    layer = policy.gpt_models()[0].decoder.layers[0]
    linear = {"LayerNormLinear": layer.self_attention.linear_qkv, "Linear": layer.self_attention.linear_proj}
    if policy.hf.num_experts:
        linear["GroupedLinear"] = layer.mlp.experts.linear_fc1
    generator, errors = torch.Generator().manual_seed(0), {}
    for kind, module in linear.items():
        weights = [p for name, p in module.named_parameters() if name.startswith("weight")]
        x = torch.randn(tokens * len(weights), weights[0].shape[1], generator=generator).to(policy.device, torch.bfloat16)
        x.requires_grad_()
        arguments = ([tokens] * len(weights),) if len(weights) > 1 else ()
        with get_fp8_context(policy.config, 0):
            out, _ = module(x, *arguments)
        towards = torch.randn(out.shape, generator=generator).to(out)
        found = [out, *torch.autograd.grad(out, (x, *weights), towards)]
        exact_x, *exact_weights = (tensor.detach().double().requires_grad_() for tensor in (x, *weights))
        exact = _exact(module, exact_x, exact_weights)
        expected = [exact, *torch.autograd.grad(exact, (exact_x, *exact_weights), towards.double())]
        parts = [_error(found[:1], expected[:1]), _error(found[1:2], expected[1:2]), _error(found[2:], expected[2:])]
        errors[kind] = dict(zip(("output", "input", "weight"), parts, strict=True))
    return errors


def psft(folder: str, data: str, run: str, options: list[str], steps: int) -> dict[str, Any]:
    """Updates as `megapsft train` makes them: likelihoods and ratios, (least, largest), of each; nothing is saved."""
    began = _started(folder, data, run, options)
    reports = [report for step in range(steps) for report in _step(began, step)]
    began.close()
    return {
        "nll": [r["objective/nll"] for r in reports],
        "ratio": [[r["objective/ratio_min"], r["objective/ratio_max"]] for r in reports],
        "layers": began.policy.config.transformer_impl,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def resumed(folder: str, data: str, run: str, before: list[str], after: list[str]) -> dict[str, Any]:
    """A step, a checkpoint, a step; and the second step again from the checkpoint, as configured by `after`."""
    began = _started(folder, data, run, before)
    _step(began, 0)
    began.checkpoints.save(1, dataclasses.asdict(began.done), began.models())
    went_on = _step(began, 1)
    began.close()
    shutdown()
    became = _started(folder, data, run, after)
    states = _states(became.policy)
    again = _step(became, 1)
    became.close()
    losses = [[report["train/loss"] for report in reports] for reports in (went_on, again)]
    return {"went_on": losses[0], "again": losses[1], "states": sum(state.numel() > 0 for state in states)}


def generated(folder: str, options: list[str]) -> dict[str, Any]:
    """What the policy answers to prompts of several lengths, greedily: tokens and their log-probabilities."""
    policy, samples = _policy(folder, options), _samples(read_config(folder).vocab_size)
    requests = [Request(prompt_ids=tuple(sample.token_ids.tolist())) for sample in samples]
    rollouts = InProcess(policy).generate(requests, Sampling(temperature=0, max_tokens=5))
    return {"tokens": [r.response_ids for r in rollouts], "logprobs": [list(r.rollout_logprobs) for r in rollouts]}


SCENARIOS = {function.__name__: function for function in (names, agreement, packed, products, psft, resumed, generated)}


def _config(folder: str, options: list[str]) -> Config:
    return load_config(None, [f"model.path={folder}", "model.make_vocab_size_divisible_by=16", *options])


def _policy(folder: str, options: list[str], trained: bool = False) -> Policy:
    """The model in a world of this process alone; with gradient buffers where it is to be trained."""
    config, hf = _config(folder, options), read_config(folder)
    mesh = plan_mesh(config.parallel, 1, model_shape(hf), torch.cuda.is_available())
    initialize(mesh, config.parallel, seed=1)
    family = family_of(hf)
    megatron = transformer_config(family, hf, config.model, config.parallel, mesh, config.fp8)
    chunks = build_chunks(megatron, hf, config.model, mesh)
    import_hf(chunks, folder, hf)
    wrapped = distribute(chunks, megatron, config.parallel) if trained else half(chunks, megatron)
    return Policy(chunks=wrapped, config=megatron, family=family, hf=hf, source=Path(folder), mesh=mesh)


def _samples(vocabulary: int) -> list[Sample]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, vocabulary, length).astype(np.int32) for length in LENGTHS]
    return [Sample(token_ids=row, loss_mask=np.arange(len(row)) > 0, source="random") for row in rows]


def _minibatch(samples: list[Sample], policy: Policy, options: list[str], packing: bool) -> Minibatch:
    fp8 = load_config(None, options).fp8
    layout = Layout(packing=packing, pack_length=sum(LENGTHS), micro_batch_size=1, alignment=alignment(fp8))
    groups = [(sample,) for sample in samples]
    batch = pack(groups, minibatch_size=len(groups), layout=layout, aggregation="token-mean", pad_token_id=0)
    return batch.minibatches[0]


def _logprobs(policy: Policy, minibatch: Minibatch) -> Tensor:
    """[trained tokens] fp32 on the host, by sample."""
    parts: dict[int, Tensor] = {}
    for microbatch, output in zip(minibatch.microbatches, evaluate(policy, minibatch), strict=True):
        logprobs = read(output).logprobs.cpu()
        for sample in microbatch.sample_ids.unique().tolist():
            if sample >= 0:
                parts[sample] = logprobs[microbatch.loss_mask & (microbatch.sample_ids == sample)]
    return torch.cat([parts[sample] for sample in sorted(parts)])


def _gradient(policy: Policy, minibatch: Minibatch) -> Tensor:
    forward_backward(policy, minibatch, lambda output, batch: (read(output).logprobs[batch.loss_mask].sum(), None))
    return torch.cat([p.main_grad.flatten().cpu() for chunk in policy.chunks for p in chunk.parameters()])


@torch.no_grad()
def _of_transformers(folder: str, samples: list[Sample], dtype: torch.dtype) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(transformers, read_config(folder).architecture)  # also of models that see images
    model = kind.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    model = model.to(device, dtype).eval()
    parts = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()[None].to(device)
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        parts.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu())
    return torch.cat(parts)


def _differences(found: Tensor, expected: Tensor) -> dict[str, float]:
    apart = (found - expected).abs()
    return {"max": float(apart.max()), "mean": float(apart.mean()), "tokens": apart.numel()}


def _exact(module: torch.nn.Module, x: Tensor, weights: list[Tensor]) -> Tensor:
    norm = getattr(module, "layer_norm_weight", None)
    if norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * norm.detach().double()
    parts = x.chunk(len(weights))
    out = torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])
    return out + module.bias.detach().double() if module.use_bias and not module.te_return_bias else out


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    apart, whole = ([t.detach().double().flatten() for t in tensors] for tensors in (found, expected))
    return float((torch.cat(apart) - torch.cat(whole)).norm() / torch.cat(whole).norm())


def _started(folder: str, data: str, run: str, options: list[str]) -> Run:
    of_data = ["data.columns.prompt=question", "data.columns.demonstration=answer"]
    of_run = ["checkpoint.async_save=false", "log.tensorboard=false", "log.progress=false", "train.hang_factor=null"]
    config = _config(folder, [f"data.path={data}", f"run.dir={run}", *of_data, *of_run, *options])
    planned = plan_run(config, 1)
    initialize(planned.mesh, planned.config.parallel, seed=1)
    return start(planned)


def _step(run: Run, step: int) -> list[dict[str, float]]:
    phase = run.enter(step)
    batch = run.pack(run.source.next_groups(step), phase.objective)
    batch = with_constants(run.policy, run.reference, batch, phase.objective)
    reports = []
    for minibatch in batch.minibatches:
        report = update(run.policy, phase.objective, run.optimizer, minibatch, run.learning_rate(step, phase))
        assert report.skipped is None, report.skipped
        run.log_update(step, phase, report)
        reports.append(report.metrics)
    run.log_step(step, phase)
    return reports


def _states(policy: Policy) -> list[Tensor]:
    state = {name: value for gpt in policy.gpt_models() for name, value in gpt.state_dict().items()}
    return [value for name, value in state.items() if name.endswith("_extra_state") and isinstance(value, Tensor)]


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--standin"]
    if "--standin" in sys.argv:
        build.this_machine = plan.this_machine = lambda: HOPPER  # what this machine is taken for
    hush()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    become_world_of_one()
    results = []
    for name, options in json.loads(arguments[1]):
        began = time.perf_counter()
        try:
            found = SCENARIOS[name](**options)
        except Exception:  # a test that asks for it fails with it (measured.Found); those that follow are measured
            found = {"error": traceback.format_exc()}
        shutdown()
        results.append(found | {"seconds": time.perf_counter() - began})
        Path(arguments[0]).write_text(json.dumps(results))  # what ends this process takes none of it along


if __name__ == "__main__":
    main()
