"""Write tests/models/te_names.json: the parameters of Transformer Engine's layers, as Megatron builds them here.

    python -m tests.gpu.record_names              # where there is a GPU: the real ones
    python -m tests.gpu.record_names --standin    # derived: Megatron's own modules over tests/gpu/standin
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from megapsft.checkpoint.hf import read_config
from megapsft.checkpoint.random_init import FAMILIES, WHOLE_HEADS, init_model
from megapsft.data.arithmetic import generate, write_jsonl

RECORD = Path(__file__).parents[1] / "models" / "te_names.json"


def main() -> None:
    derived = "--standin" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_jsonl(root / "rows.jsonl", generate(64, 0))
        jobs = [["names", {"folder": str(make(family, root)), "options": []}] for family in FAMILIES]
        command = [sys.executable, "-m", "tests.gpu.scenarios", str(root / "names.json"), json.dumps(jobs)]
        subprocess.run([*command, *(["--standin"] if derived else [])], check=True)
        found = json.loads((root / "names.json").read_text())
        for one in found:
            if "error" in one:  # of the scenario, which went on with the others
                sys.exit(one["error"])
        families = {
            family: {"config": read_config(root / family).raw, "parameters": one["parameters"], "modules": one["modules"]}
            for family, one in zip(FAMILIES, found, strict=True)
        }
    how = "derived without a GPU, over tests/gpu/standin" if derived else "recorded on a GPU"
    engine = "stand-in for 2.6 to 2.19" if derived else version("transformer_engine")
    versions = {"megatron-core": version("megatron-core"), "transformer_engine": engine}
    record = {"how": how, "date": datetime.date.today().isoformat(), "versions": versions, "families": families}
    RECORD.write_text(dumped(record))


def make(family: str, root: Path) -> Path:
    """Two layers, four experts."""
    return init_model(
        family=family, data_path=root / "rows.jsonl", out_dir=root / family, vocab_size=307, hidden_size=64, num_layers=2,
        head_dim=16 if family in WHOLE_HEADS else 24, intermediate_size=128, num_experts=4, seed=1,
    )  # fmt: skip


def dumped(record: dict) -> str:
    """JSON with a line for each parameter."""
    lines, families = [], record["families"]
    for family, one in families.items():
        rows = ",\n".join(f"    {json.dumps(row)}" for row in one["parameters"])
        config, modules = json.dumps(one["config"]), json.dumps(one["modules"])
        about = f'   "config": {config},\n   "modules": {modules},\n   "parameters": [\n{rows}\n   ]\n'
        lines.append(f'  "{family}": {{\n{about}  }}')
    head = ",\n ".join(f'"{key}": {json.dumps(record[key])}' for key in ("how", "date", "versions"))
    return f'{{\n {head},\n "families": {{\n' + ",\n".join(lines) + "\n }\n}\n"


if __name__ == "__main__":
    main()
