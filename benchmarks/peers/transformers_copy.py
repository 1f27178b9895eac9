"""Load a Hugging Face folder in bf16 and save it again, as users of `transformers` do.

    python benchmarks/peers/transformers_copy.py SOURCE OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    source, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, low_cpu_mem_usage=True)
    model.save_pretrained(out)
