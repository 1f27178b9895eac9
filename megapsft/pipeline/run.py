"""Stages one after the other, each in processes of its own; what is done is not done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapsft.checkpoint.export import export_run
from megapsft.config import Config
from megapsft.errors import Refused
from megapsft.evaluate.engine import weights_digest
from megapsft.metrics.records import read_records
from megapsft.metrics.shown import Picture
from megapsft.output.whole import write_whole
from megapsft.pipeline.config import START
from megapsft.pipeline.measure import ROW, measure
from megapsft.pipeline.plan import PipelinePlan, Stage, plan_stage
from megapsft.platform.launch import LAUNCHED
from megapsft.report.hand_off import NAME as HAND_OFF
from megapsft.report.hand_off import hand_off_of, show_hand_off, write_hand_off
from megapsft.train.plan import run_folder, to_yaml
from megapsft.train.stop import STOPPED
from megapsft.train.trackers import open_trackers

STARTED_FROM = "started-from.json"  # in the folder of a stage
GRACE_SECONDS = 60.0  # of a stage that was interrupted


def run_pipeline(plan: PipelinePlan) -> int:
    """Train, export and compare what is not done yet; the exit code of the stage that failed, or 0.

    After each stage RUN/hand-off.json, .md and .png hold the rows of `measure` so far.

    Raises:
        Refused: another model than the one that a stage was started from; what `export_run` and `measure` refuse.
    """
    environment = dict(os.environ)  # before the comparison is a world of its own
    rows = _compare(plan, START, [])
    for number, stage in enumerate(plan.stages):
        if stage.begun and not stage.checked:
            stage = plan_stage(plan.config, number)  # its model was not there at first
        _check_start(stage)
        if not stage.done:
            code = _train(stage, environment)
            if code:
                return _failed(stage, code)
            export_run(stage.folder, stage.export)
        rows = _compare(plan, stage.name, rows)
    if rows:
        show_hand_off(rows)
        print(f"wrote {plan.folder}/hand-off.json, .md and .png")
    return 0


def _compare(plan: PipelinePlan, stage: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those of the stage; written, and shown where they are new and more will follow."""
    if not plan.tasks:
        return []
    known = (plan.folder / stage / ROW).is_file()
    rows = rows + measure(plan, stage)
    write_hand_off(rows, plan.folder)
    if not known:
        for trained in plan.stages:
            if trained.name == stage:
                _track(trained.config, rows, plan.folder)
        if stage != plan.stages[-1].name:
            show_hand_off(rows)
    return rows


def _track(config: Config, rows: list[dict[str, Any]], folder: Path) -> None:
    """The table so far, and its picture, to the trackers of the stage's run, where it ended."""
    update = read_records(run_folder(config) / "metrics.jsonl")[-1]["update"]
    for tracker in open_trackers(config, update):
        tracker.show([hand_off_of(rows), Picture(HAND_OFF, folder / f"{HAND_OFF}.png")], update)
        tracker.close()


def _check_start(stage: Stage) -> None:
    """Refuse to go on from other weights than the stage was started from, and write down which they are."""
    file, weights = stage.folder / STARTED_FROM, weights_digest(stage.model)
    if not file.is_file():
        write_whole(file, json.dumps({"model": str(stage.model), "weights": weights}) + "\n")
    elif json.loads(file.read_text())["weights"] != weights:
        rule = f"was started from other weights than {stage.model} holds now"
        raise Refused(f"stage {stage.name}", rule, f"remove {stage.folder} to train it anew, or use another run.dir")


def _train(stage: Stage, environment: Mapping[str, str]) -> int:
    """`megapsft train` of the stage's resolved config; its exit code."""
    write_whole(stage.config_file, to_yaml(stage.config))
    return run_alone([sys.executable, "-u", "-m", "megapsft.cli", "train", str(stage.config_file)], environment)


def run_alone(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a command of ours that calls `die_with_launcher`; its exit code, that of a shell where a signal ended it.

    It is killed when this process ends, however that came about (Linux). Ctrl-C is handed on once and waited for, and makes
    it 130; at a second one, and where it takes too long, the command is killed.
    """
    # a group of its own: a terminal sends Ctrl-C to all of a group, and it would come twice
    process = subprocess.Popen(command, env={**environment, LAUNCHED: str(os.getpid())}, process_group=0)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = 130
        try:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_SECONDS)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return 128 - code if code < 0 else code


def _failed(stage: Stage, code: int) -> int:
    what = {130: "was interrupted", STOPPED: "was stopped"}.get(code, f"ended with exit code {code}")
    remedy = "the same command goes on from its last checkpoint"
    if code in (2, 3):
        remedy = f"mend what it says above, then {remedy}"
    print(f"megapsft: stage {stage.name} {what}; {remedy} in {stage.folder}", file=sys.stderr)
    return code
