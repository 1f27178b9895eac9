"""GRPO against the real SGLang server, with two training ranks: dense and MoE.

After every update the engine compares the server's checksums with those of the policy's weights, and a server that differs is not
asked. Here: that a run goes through it, that versions and log-probabilities agree, and that steps may overlap.
"""

from __future__ import annotations

import pytest

from megapsft import cli
from tests.e2e.test_rl import QUIET, half_knowing, sums, train  # noqa: F401  fixtures
from tests.ranks import run_ranks
from tests.shipped import FOLDER

pytestmark = pytest.mark.servers

SGLANG = ["rollout.engine=sglang", "rollout.server_args=[--max-total-tokens, '4096']", "train.steps=3"]


@pytest.mark.parametrize(
    ("family", "split", "options"),
    [
        ("qwen3", "parallel.tensor_model_parallel_size=2", ["rollout.weight_update=tensor"]),
        ("qwen3_moe", "parallel.expert_model_parallel_size=2",
         ["rollout.weight_update=distributed", "model.moe_routing_replay=rollout"]),
    ],
)  # fmt: skip
def test_two_ranks_learn_from_a_server(family, split, options, train, half_knowing):  # noqa: F811
    steps = train("grpo", half_knowing(family), "run", split, *SGLANG, *options, ranks=2)
    assert len(steps) == 3
    for step in steps:
        assert step["rollout/groups"] == 8
        assert step["data/samples"] == 32
        assert step["rollout/weight_lag_max"] == 0  # each step is sampled with the weights that the one before left
        assert step["rollout/mismatch_max"] < 2e-3  # fp32 on both sides
        assert step["perf/weight_update_seconds"] > 0


def test_a_server_that_is_not_there_is_refused_on_every_rank(half_knowing, sums, tmp_path):  # noqa: F811
    where = [f"model.path={half_knowing()}", f"data.path={sums}", f"run.dir={tmp_path / 'run'}"]
    servers = ["rollout.engine=sglang", "rollout.urls=[http://127.0.0.1:9]", "parallel.tensor_model_parallel_size=2"]
    arguments = ["train", str(FOLDER / "grpo/tiny-qwen3-arithmetic.yaml"), *where, *servers, *QUIET]
    assert run_ranks(2, cli.main, arguments) == [2, 2]


def test_steps_ahead_are_sampled_while_one_is_trained(train, half_knowing):  # noqa: F811
    ahead = ["rollout.max_weight_lag=1", "rollout.oversample=1.5", "train.steps=5"]
    steps = train("grpo", half_knowing(), "run", *SGLANG, *ahead)
    assert [step["rollout/groups"] for step in steps] == [8] * 5
    lags = [step["rollout/weight_lag_max"] for step in steps]
    assert lags[0] == 0
    assert max(lags) == 1
    drawn = 32 * steps[-1]["epoch"]
    assert 40 <= drawn <= 60  # what was drawn beyond the forty that are trained waits
