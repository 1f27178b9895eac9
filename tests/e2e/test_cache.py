"""A run whose ranks map the tokens that one process made is the run whose ranks each tokenise the rows."""

from __future__ import annotations

from tests.command import megapsft
from tests.e2e.test_kill import records, start

SPLIT = ["parallel.tensor_model_parallel_size=2", "train.minibatch_size=8", "train.steps=3"]


def test_the_same_run_with_tokens_that_are_kept(tiny_models, tiny_data, tmp_path):
    model, kept = tiny_models("qwen3"), tmp_path / "kept"
    for name, more in {"without": [], "with": [f"data.cache={kept}"]}.items():
        with start(model, tiny_data, tmp_path / name, [*SPLIT, *more]) as run:
            _, error = run.communicate(timeout=300)
            assert run.returncode == 0, error
    for file in ("metrics.jsonl", "steps.jsonl"):
        assert records(tmp_path / "with" / file) == records(tmp_path / "without" / file)
    (folder,) = [path for path in kept.iterdir() if path.is_dir()]
    assert folder.name.startswith(tiny_data.stem)

    done = megapsft("train", str(tmp_path / "with/config.yaml"), "train.steps=4", "data.cache=null")  # goes on without it
    assert done.returncode == 0, done.stderr
    assert "6 steps" in done.stdout
