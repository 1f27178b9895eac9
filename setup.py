"""Packaging. The core runs everything on a laptop without a GPU; what only some users need is an extra."""

from pathlib import Path

from setuptools import find_packages, setup

core = [
    "torch>=2.8",
    # 0.16.1 is the last for Python 3.11; 0.20 moves GPTModel to HybridModel. Never its extras: they pull CUDA-only packages
    "megatron-core>=0.16.1,<0.20",
    "psutil",  # megatron's asynchronous checkpoint writer hangs without it
    "einops",
    "httpx",  # to SGLang's servers
    "numpy",
    "safetensors>=0.5",
    "transformers>=5.0,<6",
    "tokenizers",
    "jinja2",
    "pydantic>=2.7",
    "pyyaml",
    "tyro>=1.0",
    "rich>=13",
]
extras = {
    "data": ["pyarrow"],
    "track": ["tensorboard", "wandb"],
    "report": ["matplotlib"],
    "gpu": ["transformer-engine[pytorch]"],
    "bench": ["accelerate"],
    "math": ["math-verify>=0.9"],  # the reward math_answer; never its own extras: they pin another antlr
    # the head's kernels in Triton's interpreter, without a GPU; that interpreter (3.6) fails with numpy 2.4's integers. On a GPU
    # torch brings its own triton
    "kernels": ["triton; sys_platform == 'linux'", "numpy<2.4"],
    "harness": ["lm-eval>=0.4.9"],  # tasks of lm-evaluation-harness: megapsft evaluate --lm-eval
    "site": ["mkdocs-material>=9.5", "latex2mathml"],  # make site
    # pytest-xdist 3.8 does not keep the groups of pytest 9.2; peft reads, in tests, what runs with LoRA write
    "dev": ["ruff", "pytest<9.2", "pytest-timeout", "pytest-xdist", "peft>=0.18"],
}
laptop = ("data", "track", "report", "bench", "math", "harness", "kernels", "site", "dev")
extras["laptop"] = sorted({package for name in laptop for package in extras[name]})

setup(
    name="megapsft",
    version="0.1.0",
    description="Post-training on Megatron-Core: PSFT and its kin, proved on a laptop, run on a cluster",
    long_description=Path(__file__).with_name("README.md").read_text() if Path(__file__).with_name("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megapsft", "megapsft.*"]),
    package_data={"megapsft.rollout.sglang": ["cpu/*.py"]},  # of the servers' interpreter; never imported in ours
    install_requires=core,
    extras_require=extras,
    entry_points={"console_scripts": ["megapsft = megapsft.cli:main"]},
)
