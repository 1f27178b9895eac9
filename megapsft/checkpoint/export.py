"""A run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from megapsft.checkpoint.dist import check_architecture, load_model, read_state
from megapsft.checkpoint.hf import export_stream, read_config, save_hf
from megapsft.checkpoint.hf_save import check_free
from megapsft.config import ParallelConfig, load_config
from megapsft.errors import Refused
from megapsft.models.families import family_of
from megapsft.parallel import initialize, plan_mesh, shutdown
from megapsft.platform.compat import hush
from megapsft.platform.cpu import has_cuda
from megapsft.platform.launch import become_world_of_one
from megapsft.policy.build import DTYPES, build_chunks, model_shape, transformer_config


def export_run(run: Path, out: Path, checkpoint: str = "latest", dtype: str | None = None) -> Path:
    """Load `checkpoint` of `run` into one process, whatever split wrote it, and write `out`.

    Returns:
        `out`.

    Raises:
        Refused: no such run or checkpoint; `out` holds something already.
    """
    if not (run / "config.yaml").is_file():
        raise Refused(str(run), "is not the folder of a run (no config.yaml)", "name a run.dir")
    path = run / "checkpoints" / checkpoint
    if not path.exists():
        there = sorted(p.name for p in path.parent.glob("*") if not p.name.endswith(".partial")) if path.parent.exists() else []
        raise Refused(str(path), "is not there", "use one of " + ", ".join(there) if there else "train a step first")
    config = load_config(run / "config.yaml")
    hf = read_config(config.model.path)
    check_architecture(path, read_state(path), hf)
    family, parallel = family_of(hf), ParallelConfig()
    check_free(out)
    become_world_of_one()
    hush()
    mesh = plan_mesh(parallel, 1, model_shape(hf), has_cuda())
    initialize(mesh, parallel, seed=0)
    try:
        megatron = transformer_config(family, hf, config.model, parallel, mesh)
        chunks = build_chunks(megatron, hf, config.model, mesh)
        for chunk in chunks:
            chunk.to(megatron.params_dtype)
        load_model(path.resolve(), chunks)
        target = DTYPES[dtype] if dtype else None
        save_hf(export_stream(chunks, hf), hf, Path(config.model.path), out, dtype=target)
    finally:
        shutdown()
    return out
