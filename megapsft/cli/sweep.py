"""megapsft sweep: how a run scales over nodes and splits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from megapsft.cli.numbers import numbers_of
from megapsft.cli.overrides import OVERRIDES
from megapsft.errors import Refused


def sweep(
    config: tyro.conf.Positional[Path],
    *,
    nodes: str,
    out: Path,
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    scaling: Literal["strong", "weak"] = "strong",
    steps: int = 12,
    cluster: Path | None = None,
    dry_run: bool = False,
    report_only: bool = False,
) -> int:
    """Measure how a run scales: megapsft sweep CONFIG.yaml --nodes 1,2,4 --out DIR [key=value ...]. A job a point, and a report.

    For example:
        megapsft sweep configs/psft/qwen3-30b-a3b.yaml --nodes 2,4,8 --cluster configs/cluster/my.yaml --out sweeps/30b
        megapsft sweep CONFIG.yaml --nodes 1,2,4 --vary parallel.tensor_model_parallel_size=1,2 --scaling weak --out sweeps/weak
        megapsft sweep CONFIG.yaml --nodes 1,2 --cluster my.yaml --out sweeps/first cluster.time=00:30:00 --dry-run

    The same command again submits what is neither done nor queued, and reports on what there is (docs/sweep.md).

    Args:
        config: YAML file; `key=value` arguments overlay it, `megapsft config` lists the keys.
        nodes: numbers of nodes, with commas.
        out: folder of the sweep: a run for each point, report.json, report.md and scaling.png.
        vary: key=value,value,...: a point for each of the values, on each number of nodes; once for each key.
        scaling: strong: the batch of the file for all; weak: it is that of the fewest nodes, and grows with the nodes.
        steps: of each run; the first two are not measured.
        cluster: YAML file, see configs/cluster/example.yaml; `cluster.key=value` arguments overlay it.
        dry_run: check everything, print the points, write and submit nothing.
        report_only: submit nothing, report on what there is.
    """
    from megapsft.cluster.slurm.config import load_cluster
    from megapsft.cluster.sweep import sweep as sweeps
    from megapsft.cluster.sweep.measure import notes, rows
    from megapsft.cluster.sweep.points import Asked, parse_vary, points
    from megapsft.output.places import check_folder
    from megapsft.report.picture import need_matplotlib
    from megapsft.report.scaling import show_scaling, write_scaling

    need_matplotlib("sweep")
    if dry_run and report_only:
        raise Refused("--dry-run --report-only", "exclude each other", "leave one out")
    of_cluster = [text.removeprefix("cluster.") for text in OVERRIDES if text.startswith("cluster.")]
    machines = load_cluster(cluster, of_cluster)
    asked = Asked(
        config=str(config),
        overrides=tuple(text for text in OVERRIDES if not text.startswith("cluster.")),
        nodes=tuple(numbers_of("--nodes", nodes)),
        vary=parse_vary(vary),
        scaling=scaling,
        steps=steps,
        ranks_per_node=machines.tasks_per_node,
        gpu=machines.gpu if machines.gpus_per_node else None,
    )
    check_folder(f"--out {out}", out)
    found = points(asked, out)
    sweeps.check_folder(asked, out)
    if report_only and not (out / sweeps.ASKED).is_file():
        raise Refused(f"--report-only --out {out}", "is no sweep yet", "leave out --report-only")
    if dry_run or report_only:
        states = {point.name: sweeps.state_of(point) for point in found}
    else:
        with sweeps.held(out):
            sweeps.write(asked, found, out)
            states = sweeps.submit_missing(found, config, machines, print)
    told, basis = rows(found, states), notes(asked, found)
    show_scaling(told)
    for note in basis:
        print(f"note: {note}")
    if not dry_run:
        print(f"wrote {', '.join(str(path) for path in write_scaling(told, basis, out))}")
    refused = sweeps.REFUSED in {state.name for state in states.values()}
    return 2 if refused or all(point.refused for point in found) else 0
