"""Ask an exported model a problem it was not trained on, through `transformers` alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quickstart.sample", description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("problems", type=Path, help=".jsonl with the columns question and answer")
    parser.add_argument("--unlike", type=Path, required=True, help=".jsonl of the training data; its questions are passed over")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    seen = {row["question"] for row in read(options.unlike)}
    row = next(row for row in read(options.problems) if row["question"] not in seen)
    print(f"question\n{indent(row['question'])}")
    print(f"answer of the model, greedy\n{indent(answer(options.model, row['question']))}")
    print(f"true answer\n{indent(row['answer'])}")
    return 0


def answer(folder: Path, question: str, most: int = 160) -> str:
    """What the model answers, greedily, in at most so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=most, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
