"""megapsft convert: weights from Hugging Face to Megatron and back."""

from __future__ import annotations

import tyro

from megapsft.cli.convert.hf_to_megatron import hf_to_megatron
from megapsft.cli.convert.megatron_to_hf import megatron_to_hf
from megapsft.cli.convert.verify import verify

CONVERT = {
    "hf-to-megatron": hf_to_megatron,
    "megatron-to-hf": megatron_to_hf,
    "verify": verify,
}


def convert(*arguments: str) -> int:
    """Convert weights from Hugging Face to Megatron and back, and compare them: megapsft convert --help.

    For example:
        megapsft convert hf-to-megatron --hf Qwen3-30B-A3B --out ckpt
        megapsft convert megatron-to-hf --megatron runs/x --out hf
        megapsft convert verify --hf hf --against runs/x

    Args:
        arguments: which conversion, and its options.
    """
    about = "Convert weights from Hugging Face to Megatron and back, and compare them."
    return tyro.extras.subcommand_cli_from_dict(CONVERT, prog="megapsft convert", args=arguments, description=about)
