"""megapsft rollout: responses to the prompts of a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import tyro

from megapsft.cli.engine import ENGINE, EngineOptions
from megapsft.cli.printed import earlier
from megapsft.cli.prompts import PROMPTS, PromptOptions


def rollout(
    *,
    model: Path,
    data: Path,
    out: Path,
    n: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    max_tokens: int = 512,
    limit: int | None = None,
    reward: tuple[str, ...] = (),
    prompts: tyro.conf.OmitArgPrefixes[PromptOptions] = PROMPTS,
    engine: tyro.conf.OmitArgPrefixes[EngineOptions] = ENGINE,
) -> int:
    """Sample responses to the prompts of a file, into a JSONL that data.kind=rollouts reads.

    For example:
        megapsft rollout --model models/tiny --data prompts.jsonl --out rollouts.jsonl
        megapsft rollout --model models/tiny --data train.jsonl --out rollouts.jsonl --n 4 --reward math_answer
        megapsft rollout --model Qwen3-8B --data train.jsonl --out rollouts.jsonl --engine sglang --tensor-parallel-size 2

    Killed, it goes on from there when it is run again; no response is asked for twice.

    Args:
        model: Hugging Face folder with a tokenizer and a chat template.
        data: .jsonl or .parquet.
        out: the .jsonl to write; the options lie beside it as .json.
        n: responses to each prompt.
        temperature: 0 is greedy.
        top_p: tokens are drawn from the most probable ones that have so much together.
        top_k: tokens are drawn from so many; -1: from all.
        max_tokens: of a response.
        limit: only the first prompts.
        reward: names of rewards, such as math_answer, or path/to/file.py; their sum is written with each rollout.
    """
    from megapsft.data.chat_template import ChatTemplate
    from megapsft.evaluate.batch_inference import rollout as sample
    from megapsft.evaluate.benchmark import load_benchmark
    from megapsft.output.places import check_file
    from megapsft.rewards.registry import build_reward
    from megapsft.rollout.base import Sampling

    check_file("--out", out)
    options = engine.resolved()
    rewards = [{"name": name} for name in reward]
    template = ChatTemplate.load(model)
    needs_reference = any(build_reward(entry)[1].needs_reference for entry in rewards)
    asked = load_benchmark(data, template, limit=limit, needs_reference=needs_reference, **asdict(prompts))
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        stop_token_ids=template.stop_token_ids,
        seed=engine.seed,
    )
    written = sample(
        model,
        asked,
        template,
        out,
        n=n,
        sampling=sampling,
        options=options,
        dtype=engine.dtype_for(model),
        rewards=rewards,
        progress=engine.progress,
    )
    print(f"wrote {out}: {written.responses} responses to {written.prompts} prompts{earlier(written.resumed)}")
    return 0
