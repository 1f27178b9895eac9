"""megapsft probe: the noise of ratios, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megapsft.cli.overrides import OVERRIDES
from megapsft.cli.world import is_first, world_of

if TYPE_CHECKING:
    from megapsft.train.plan import RunPlan


def probe(
    config: tyro.conf.Positional[Path],
    *,
    samples: int | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    nproc_per_node: int | None = None,
) -> int:
    """Measure how far ratios are from 1 before any update: megapsft probe CONFIG.yaml [key=value ...]. Nothing is trained.

    For example:
        megapsft probe configs/psft/tiny-qwen3-gsm8k.yaml data.path=train.jsonl model.dtype=bfloat16
        megapsft probe configs/psft/tiny-qwen3-moe-gsm8k.yaml --samples 32 --out probe.json --plot probe.png
        torchrun --nproc-per-node 8 -m megapsft.cli probe CONFIG.yaml     (or srun: it joins)

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        samples: rows of the data, the first in the order of the run; default: those of its first update.
        out: JSON to write.
        plot: PNG to draw: how ratios are spread, and the clip range.
        nproc_per_node: processes to start here; default: the GPUs of this machine, or the fewest that the split needs.
    """
    from megapsft.config import RunConfig, load_config
    from megapsft.output.places import check_file
    from megapsft.platform.launch import become_world_of_one, torchrun
    from megapsft.report.picture import need_matplotlib
    from megapsft.train.plan import plan_run
    from megapsft.train.probe import first_groups

    check_file("--out", out)
    check_file("--plot", plot)
    if plot is not None:
        need_matplotlib("--plot", without="leave --plot out")
    resolved = load_config(config, OVERRIDES)
    if resolved.run.dir:  # one that is never made: what stands in run.dir is another run than that of a probe
        resolved = replace(resolved, run=RunConfig(dir=str(Path(resolved.run.dir) / "probe")))
    world, joined = world_of(resolved.parallel, nproc_per_node)
    plan = plan_run(resolved, world)
    first_groups(plan, samples)  # refuses at the door too
    if world > 1 and not joined:
        options = {"--samples": samples, "--out": out, "--plot": plot}
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        return torchrun(world, ["probe", str(config), *OVERRIDES, *given])
    if not joined:
        become_world_of_one()
    return _probe_here(plan, samples, out, plot)


def _probe_here(plan: RunPlan, samples: int | None, out: Path | None, plot: Path | None) -> int:
    """As one rank of the world that the environment describes; the first one reports."""
    from megapsft import parallel
    from megapsft.platform.compat import hush
    from megapsft.report.probe import draw_probe, show_probe, write_probe
    from megapsft.train.probe import measure_noise

    hush()
    parallel.initialize(plan.mesh, plan.config.parallel, plan.config.train.seed)
    measured = measure_noise(plan, samples)
    if is_first():
        show_probe(measured)
        if out is not None:
            write_probe(measured, plan, out)
            print(f"wrote {out}")
        if plot is not None:
            draw_probe(measured, plan, plot)
            print(f"drew {plot}")
    parallel.shutdown()
    return 0
