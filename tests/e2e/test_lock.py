"""Two worlds never write into one run."""

from __future__ import annotations

import fcntl

from tests.command import megapsft


def test_a_run_that_is_being_trained_is_refused(tiny_models, tiny_data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("a+") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        result = megapsft(
            "train", "configs/psft/tiny-qwen3-gsm8k.yaml", f"model.path={tiny_models('qwen3')}", f"data.path={tiny_data}",
            f"run.dir={run}", "train.steps=1", "train.sft_warmup_steps=0",
        )  # fmt: skip
    assert result.returncode == 2
    assert "is being trained by another process" in result.stderr
    assert {path.name for path in run.iterdir()} == {".lock"}
