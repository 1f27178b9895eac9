"""PPO's critic: values to advantages on real ranks, its own updates, and its place in checkpoints."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from megapsft import cli
from megapsft.advantages.gae import gae, whiten
from megapsft.data.arithmetic import generate, rollouts, write_jsonl
from megapsft.objectives.registry import build_objective
from megapsft.train.critic import estimate
from megapsft.train.run import build_critic
from tests.ranks import run_ranks
from tests.train.test_update import make_run, shutdown

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
