"""The table of runs: as many samples for each, learning rates by the rule, and what a changed setting redoes."""

from dataclasses import replace

import pytest

from evidence.methods import BASE, RESPONSES, table
from evidence.plan import Plan
from evidence.runs import CONFIGS
from evidence.sizes import CI, FULL
from megapsft.config import load_config
from tests.evidence.made import made

ANY = made()[BASE].runs[1]


def with_valid(accuracy):
    return replace(ANY, accuracy={**ANY.accuracy, "valid": [0.0, accuracy]})


def digests(sizes):
    return {label: spec.digest for label, spec in Plan(sizes, lambda spec: None, guess=True).known()}


@pytest.mark.parametrize("sizes", [FULL, CI], ids=["full", "ci"])
def test_every_run_is_a_config_and_trains_on_as_many_samples_as_the_table_says(sizes):
    plan = Plan(sizes, lambda spec: None, guess=True)
    for name, method in table(sizes).items():
        config = load_config(CONFIGS / method.config, plan.spec(name, sizes.seeds[0]).set)
        of_a_row = {"demonstrations": 1, "preferences": 2}.get(config.data.kind, RESPONSES + (config.objective["name"] == "srft"))
        steps = config.train.steps + config.train.sft_warmup_steps
        assert steps * config.train.batch_size * of_a_row == method.samples, name
        rows = sizes.amounts.pretrain if name == BASE else sizes.amounts.demonstrations
        assert config.train.batch_size <= rows, name
    fine_tuned = [method for method in table(sizes).values() if method.config == "finetune.yaml"]
    assert {method.samples for method in fine_tuned} == {sizes.steps * sizes.batch}
    two_stages = table(sizes)["sft"].samples + table(sizes)["sft -> grpo"].samples
    of_a_step = sizes.rl_prompts * (RESPONSES + 1)
    assert two_stages - of_a_step < table(sizes)["srft"].samples <= two_stages


def test_runs_become_known_as_learning_rates_are_chosen():
    done = {}
    plan = Plan(FULL, lambda spec: done.get(spec.digest))
    first = dict(plan.known())
    assert {label.partition(",")[0] for label in first} == {BASE, "sft", "sft_kl", "psft", "dft", "iw_sft", "gem", "srft"}
    assert "psft, seed 1" not in first
    for rate, accuracy in zip(plan.rates("psft"), (0.5, 0.6, 0.6), strict=True):
        assert plan.rate("psft") is None
        done[plan.spec("psft", 1, rate).digest] = with_valid(accuracy)
    assert plan.rate("psft") == plan.rates("psft")[1]  # the lower of two that are equal
    now = dict(plan.known())
    assert {"psft, seed 3", "psft, clip none, seed 1", "psft -> grpo, rate 0.0003", "psft -> dpo, rate 0.0003"} <= set(now)
    assert "psft -> grpo, seed 1" not in now
    assert now["psft, seed 1"] == now[f"psft, rate {plan.rate('psft'):g}"]  # done already


def test_nothing_is_tried_where_there_is_one_learning_rate():
    plan = Plan(CI, lambda spec: None)
    assert plan.rate("sft") == table(CI)["sft"].rates[1]
    assert {label for label, _ in plan.known()} == {label for label, _ in Plan(CI, lambda spec: None, guess=True).known()}


def test_a_changed_setting_redoes_what_depends_on_it():
    before = digests(FULL)

    def redone(**changes):
        after = digests(replace(FULL, **changes))
        return {label.partition(",")[0] for label in before if before[label] != after[label]}

    assert redone(dpo_steps=FULL.dpo_steps + 1) == {"sft -> dpo", "psft -> dpo"}
    assert redone(rl_steps=FULL.rl_steps + 9) == {"sft -> grpo", "psft -> grpo", "srft"}
    everything = {name.partition(",")[0] for name in table(FULL)}
    assert redone(pretrain_steps=FULL.pretrain_steps + 1) == redone(amounts=replace(FULL.amounts, problems=7)) == everything
    assert redone() == set()
