"""What a run says beside a checkpoint of itself: how far it was, and which model it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megapsft.errors import Refused
from megapsft.models.hf_config import HFConfig

STATE = "state.json"
ARCHITECTURE = ("architecture", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "head_dim", "intermediate_size", "num_experts", "moe_intermediate_size", "tie_word_embeddings")  # fmt: skip


def read_state(path: Path) -> dict[str, Any]:
    """The run's own state as saved with the checkpoint at `path`.

    Raises:
        Refused: there is none.
    """
    file = path / STATE
    if not file.is_file():
        remedy = "name a folder such as RUN/checkpoints/latest"
        raise Refused(str(path), "is not a checkpoint of megapsft (no state.json)", remedy)
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise Refused(str(file), f"is damaged ({error})", "point `latest` at an older checkpoint") from None


def check_architecture(path: Path, state: dict[str, Any], hf: HFConfig) -> None:
    """Refuse to load a checkpoint into a model of another shape."""
    for name, value in shape_of(hf).items():
        if state[name] != value:
            raise Refused(
                f"{path} ({name}={state[name]})",
                f"is a checkpoint of another architecture: this model has {name}={value}",
                "continue it with the model it was made from, or choose another run.dir",
            )


def shape_of(hf: HFConfig) -> dict[str, Any]:
    """What two models must have in common for one to hold the other's weights."""
    return {name: getattr(hf, name) for name in ARCHITECTURE}
