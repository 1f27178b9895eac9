"""Hugging Face folder to torch_dist checkpoint: `megapsft convert hf-to-megatron`."""

import sys

from megapsft.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
