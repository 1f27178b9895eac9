"""Runs in nemo-run's interpreter, never in ours: one job through its Slurm executor.

    python nemo_job.py JOB.json ANSWER.json

JOB.json: name; options of sbatch, by name; setup, lines of the script before the ranks are started; srun, more options of it, as
a shell reads them; command, likewise; dry_run. ANSWER.json: the script, and the job's number where it was submitted.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import nemo_run

IN = f"/{nemo_run.config.RUNDIR_NAME}"  # which it replaces in scripts, wherever it stands


def executor_of(job: dict) -> nemo_run.SlurmExecutor:
    """Options that it has a field for by that field, the others as they are."""
    known = {field.name for field in dataclasses.fields(nemo_run.SlurmExecutor) if field.init}
    options = {name.replace("-", "_"): value for name, value in job["options"].items()}
    return nemo_run.SlurmExecutor(
        **{"account": None} | {name: value for name, value in options.items() if name in known},
        additional_parameters={name: value for name, value in options.items() if name not in known},
        job_name_prefix="megapsft-",  # never used: job-name is an option
        tunnel=nemo_run.LocalTunnel(job_dir=""),  # any other folder is not where it writes the script
        packager=nemo_run.Packager(),  # of nothing: nodes see the clone
        setup_lines=job["setup"],
        srun_args=job["srun"],
        retries=0,  # the job puts itself back into the queue
        poll_estimated_start_time=False,
    )


def main() -> None:
    source, answer = map(Path, sys.argv[1:])
    job = json.loads(source.read_text())
    if IN in source.read_text():
        sys.exit(f"a path of this run has {IN} in it, which nemo-run replaces by a folder of its own; rename that folder")
    entrypoint, *arguments = job["command"]
    task = nemo_run.Script(path=arguments[0], entrypoint=entrypoint, args=arguments[1:])
    with nemo_run.Experiment(job["name"]) as experiment:
        experiment.add(task, executor=executor_of(job), name=job["name"])
        if job["dry_run"]:
            experiment.dryrun(log=False, delete_exp_dir=False)
        else:
            experiment.run(detach=True)
    (script,) = Path(experiment._exp_dir).glob("*_sbatch.sh")
    number = None if job["dry_run"] else experiment.jobs[0].handle.rpartition("/")[2]
    answer.write_text(json.dumps({"script": script.read_text(), "number": number}))


if __name__ == "__main__":
    main()
