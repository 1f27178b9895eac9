"""torch_dist checkpoint to Hugging Face folder: `megapsft convert megatron-to-hf`."""

import sys

from megapsft.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
