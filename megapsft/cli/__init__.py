"""The command line: the one package that knows every other. Heavy imports wait until a command needs them."""

from __future__ import annotations

import gc
import os
import sys

import tyro

from megapsft.cli.audit import audit
from megapsft.cli.cancel import cancel
from megapsft.cli.compare import compare
from megapsft.cli.config import config
from megapsft.cli.convert import CONVERT, convert
from megapsft.cli.curves import curves
from megapsft.cli.evaluate import evaluate
from megapsft.cli.export import export
from megapsft.cli.init_model import init_model
from megapsft.cli.logs import logs
from megapsft.cli.make_data import make_data
from megapsft.cli.overrides import take_overrides
from megapsft.cli.pipeline import pipeline
from megapsft.cli.plan import plan
from megapsft.cli.preflight import preflight
from megapsft.cli.printed import complain
from megapsft.cli.probe import probe
from megapsft.cli.report import report
from megapsft.cli.rollout import rollout
from megapsft.cli.serve import serve
from megapsft.cli.status import status
from megapsft.cli.submit import submit
from megapsft.cli.sweep import sweep
from megapsft.cli.train import train
from megapsft.cli.world import is_first
from megapsft.errors import Refused

__all__ = ["COMMANDS", "CONVERT", "main"]

COMMANDS = {
    "train": train,
    "pipeline": pipeline,
    "audit": audit,
    "probe": probe,
    "compare": compare,
    "export": export,
    "convert": convert,
    "init-model": init_model,
    "make-data": make_data,
    "config": config,
    "plan": plan,
    "curves": curves,
    "report": report,
    "rollout": rollout,
    "evaluate": evaluate,
    "serve": serve,
    "preflight": preflight,
    "submit": submit,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "sweep": sweep,
}
# of the collector: imports make a million objects, which Python would go through seven times meanwhile, seconds of each start
THRESHOLD = (700, 10, 100)
WITH_OVERRIDES = ("train", "pipeline", "audit", "probe", "compare", "config", "plan", "serve", "submit", "sweep")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 where a check found what it was asked to look for, 2 where something was refused,
    3 where training stopped itself, 75 where it was asked to stop. A rank that hangs ends with 70.
    """
    gc.set_threshold(*THRESHOLD)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] and arguments[0] in WITH_OVERRIDES:
        arguments = take_overrides(arguments)
    try:
        if arguments[:1] == ["convert"]:
            return convert(*arguments[1:])
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="megapsft", args=arguments, description=__doc__)
    except Refused as error:
        return complain(error)
    except BrokenPipeError:  # `megapsft logs RUN | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if is_first():
            print("megapsft: interrupted; the same command again goes on from there, or begins again", file=sys.stderr)
        return 130
