"""The configs of the repository: what `megapsft train` takes. Those of pipelines name these."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "pipelines")
OBJECTIVES = [path for path in CONFIGS if path.parent != FOLDER]  # configs/<objective>/<name>.yaml
