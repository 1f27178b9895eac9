"""PPO's critic: values to advantages on real ranks, its own updates, and its place in checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from megapsft import cli
from megapsft.advantages.gae import gae, whiten
from megapsft.checkpoint.dist import load_model
from megapsft.checkpoint.optimizer_state import adam_step
from megapsft.config import load_config
from megapsft.data.arithmetic import generate, rollouts, write_jsonl
from megapsft.errors import Refused
from megapsft.objectives.registry import build_objective
from megapsft.train.build import build_critic
from megapsft.train.critic import estimate
from megapsft.train.plan import plan_run
from megapsft.train.update import update
from tests.ranks import run_ranks
from tests.train.test_update import make_run, shutdown, weights

PPO = ["objective.name=ppo", "data.kind=rollouts", "data.columns.prompt=prompt", "data.columns.demonstration=demonstration"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    write_jsonl(path, rollouts(generate(16, 3), seed=0, each=2))
    return path


def test_estimates_are_those_of_each_sample_whitened_over_the_step():
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(2, 5)), rng.normal(size=(1, 4))]
    trained = [np.array([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]], bool), np.array([[0, 0, 1, 0]], bool)]
    rewards = [np.where(t, rng.normal(size=t.shape), 0) for t in trained]
    options = dataclasses.replace(build_objective({"name": "ppo"}).advantages, gamma=0.9, lam=0.8)
    advantages, returns = estimate(rewards, tables, trained, options)
    raw = [gae(r, v, m, 0.9, 0.8) for r, v, m in zip([*rewards[0], rewards[1][0]], [*tables[0], tables[1][0]],
                                                     [*trained[0], trained[1][0]], strict=True)]  # fmt: skip
    white = whiten([a for a, _ in raw], [*trained[0], trained[1][0]])
    assert [a.shape for a in advantages] == [(2, 5), (1, 4)]
    np.testing.assert_allclose(advantages[0][1], white[1])
    np.testing.assert_allclose(advantages[1][0], white[2])
    np.testing.assert_allclose(returns[0][0], raw[0][1])
    plain, _ = estimate(rewards, tables, trained, dataclasses.replace(options, whiten=False))
    np.testing.assert_allclose(plain[0][1], raw[1][0])


@pytest.mark.parametrize("more", [[], ["parallel.pipeline_model_parallel_size=2"], ["parallel.context_parallel_size=2"]])
def test_a_new_critic_foretells_nothing_and_returns_are_rewards(more, tiny_models, recorded):
    """Its head is zero; with gamma = lam = 1 the return at every token is then the reward of the sample."""
    world = 2 if more else 1
    for values, returns, rewards in run_ranks(world, _values, tiny_models("qwen3"), recorded, more):
        if values is not None:
            assert np.all(values == 0)
            np.testing.assert_allclose(returns, rewards, rtol=1e-6)
            assert 0 < rewards.mean() < 1


def _values(model, data, more):
    run = make_run(model, data, *PPO, *more)
    objective = build_objective({"name": "ppo"})
    critic = build_critic(run.plan)
    batch = critic.with_values(run.pack(run.source.next_groups(0), objective), objective)
    result = None, None, None
    if critic.policy.head() is not None:
        microbatches = [m for minibatch in batch.minibatches for m in minibatch.microbatches]
        result = tuple(
            np.concatenate([getattr(m, name)[m.loss_mask].numpy() for m in microbatches])
            for name in ("values", "returns", "rewards")
        )
    shutdown()
    return result


COMMON = [
    *PPO, "model.dtype=float32", "train.batch_size=4", "train.minibatch_size=2", "data.pack_length=512", "critic.lr=1e-3",
    "optimizer.lr=1e-3", "log.progress=false", "log.tensorboard=false", "train.steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def warmed(tiny_models, recorded, tmp_path_factory):
    """A run of four steps, of which two train the critic alone, with a checkpoint of each; and the command but for run.dir."""
    folder = tmp_path_factory.mktemp("warmed")
    (folder / "c.yaml").write_text("")
    options = [
        *COMMON, f"model.path={tiny_models('qwen3')}", f"data.path={recorded}", "checkpoint.interval=1",
        "checkpoint.keep_last=9", "critic.warmup_steps=2", "optimizer.lr_warmup_steps=2",
    ]  # fmt: skip
    command = ["train", str(folder / "c.yaml"), *options]
    assert run_ranks(1, cli.main, [*command, f"run.dir={folder / 'run'}"]) == [0]
    return folder / "run", command


def records(run):
    """What its metrics.jsonl holds, but for times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "perf" not in key} for line in lines]


def test_steps_of_the_critic_alone_leave_the_policy_and_its_optimizer_bitwise(warmed, tiny_models, recorded):
    run, _ = warmed
    states = [json.loads((run / f"checkpoints/step-0000000{step}/state.json").read_text()) for step in (1, 2, 3, 4)]
    assert [state["adam_step"] for state in states] == [0, 0, 2, 4]
    assert [state["critic.adam_step"] for state in states] == [2, 4, 6, 8]
    before, *after = run_ranks(1, _weights_of_steps, tiny_models("qwen3"), recorded, run, (1, 2, 3))[0]
    for now, same in zip(after, (True, True, False), strict=True):
        assert all(torch.equal(before[name], now[name]) for name in before) == same


def _weights_of_steps(model, data, folder, steps):
    """Before the first, and at each of the checkpoints."""
    run = make_run(model, data, *PPO)
    found = [weights(run)]
    for step in steps:
        load_model(folder / f"checkpoints/step-0000000{step}", run.policy.gpt_models())
        found.append(weights(run))
    shutdown()
    return found


def test_metrics_say_which_steps_are_of_the_critic_alone(warmed):
    alone, both = records(warmed[0])[:4], records(warmed[0])[4:]
    assert [record["phase"] for record in (*alone, *both)] == ["critic"] * 4 + ["train"] * 4
    assert [record["train/lr"] for record in (*alone, *both)] == [0, 0, 0, 0, 5e-4, 5e-4, 1e-3, 1e-3]
    assert all(record["objective/ratio_max"] == record["objective/ratio_min"] == 1.0 for record in alone)
    assert both[1]["objective/ratio_max"] > 1.0
    assert not any("train/grad_norm" in record for record in alone)
    assert all(record["train/skipped_updates"] == 0 for record in (*alone, *both))
    assert alone[-1]["critic/loss"] != alone[0]["critic/loss"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_resumed_around_the_end_of_the_critics_own_steps_goes_on_as_it_would_have(step, warmed, tmp_path):
    run, command = warmed
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    (tmp_path / "run/checkpoints/latest").unlink()
    (tmp_path / "run/checkpoints/latest").symlink_to(f"step-0000000{step}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines[: 2 * step]))
    assert run_ranks(1, cli.main, [*command, f"run.dir={tmp_path / 'run'}"]) == [0]
    assert records(tmp_path / "run") == records(run)


def test_a_policy_that_would_never_be_trained_is_refused(tiny_models, recorded):
    options = [*COMMON, f"model.path={tiny_models('qwen3')}", f"data.path={recorded}", "critic.warmup_steps=4"]
    with pytest.raises(Refused, match="critic.warmup_steps=4: leaves the policy none of train.steps=4; use fewer"):
        plan_run(load_config(None, options), 1)


@pytest.mark.parametrize("more", [["parallel.tensor_model_parallel_size=2"], ["parallel.pipeline_model_parallel_size=2"], []])
def test_a_report_without_a_step_is_that_of_an_update(more, tiny_models, recorded):
    for alone, updated, same in run_ranks(2, _reports, tiny_models("qwen3"), recorded, more):
        assert alone["train/loss"] == pytest.approx(updated["train/loss"], abs=1e-6)
        assert alone["objective/nll"] == updated["objective/nll"]
        assert same


def _reports(model, data, more):
    run = make_run(model, data, *PPO, *more)
    objective = build_objective({"name": "ppo"})
    critic = build_critic(run.plan)
    (minibatch,) = critic.with_values(run.pack(run.source.next_groups(0), objective), objective).minibatches
    before = weights(run)
    alone = update(run.policy, objective, run.optimizer, minibatch, None)
    after = weights(run)
    same = all(torch.equal(before[name], after[name]) for name in before) and adam_step(run.optimizer) == 0
    updated = update(run.policy, objective, run.optimizer, minibatch, 1e-3)
    shutdown()
    return alone.metrics, updated.metrics, same


def test_a_resumed_run_has_the_critic_of_one_that_never_stopped(tiny_models, recorded, tmp_path):
    options = [
        *PPO, f"model.path={tiny_models('qwen3')}", f"data.path={recorded}", "model.dtype=float32", "train.batch_size=4",
        "train.minibatch_size=2", "data.pack_length=512", "checkpoint.interval=2", "critic.lr=1e-3", "optimizer.lr=1e-3",
        "objective.reward_kl_coef=0.05", "log.progress=false", "log.tensorboard=false",
    ]  # fmt: skip
    (tmp_path / "c.yaml").write_text("")
    for name, steps in (("whole", [4]), ("resumed", [2, 4])):
        for count in steps:
            arguments = ["train", str(tmp_path / "c.yaml"), *options, f"run.dir={tmp_path / name}", f"train.steps={count}"]
            assert run_ranks(1, cli.main, arguments) == [0]
    whole, resumed = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "resumed")
    )
    assert len(whole) == 8
    for a, b in zip(whole, resumed, strict=True):
        assert {k: v for k, v in a.items() if "perf" not in k} == {k: v for k, v in b.items() if "perf" not in k}
    assert whole[-1]["critic/loss"] != whole[0]["critic/loss"]
    assert "critic/explained_variance" in whole[0]
