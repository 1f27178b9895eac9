"""The configs of the repository: what `megapsft train` takes. Those of pipelines name these; those of clusters are no runs."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name not in ("pipelines", "cluster"))
OF_PAPERS = [path for path in CONFIGS if path.parent != FOLDER and not path.name.startswith("tiny-")]  # planned, not trained here
TINY = [path for path in CONFIGS if path not in OF_PAPERS]
OBJECTIVES = [path for path in TINY if path.parent != FOLDER]  # configs/<objective>/tiny-<name>.yaml
