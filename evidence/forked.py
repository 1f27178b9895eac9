"""Commands of `megapsft` in forked children: torch and Megatron are imported once, in the process that forks."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megapsft.platform.launch import LAUNCHED, die_with_launcher

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two children side by side; and threads of OpenMP do not survive a fork


@dataclass(frozen=True)
class Ended:
    """A child that is no more."""

    pid: int
    succeeded: bool
    core_seconds: float  # of the child and of all that it waited for


def warm_up() -> None:
    """Import what every run imports, some of it only when it is used. No process group is touched: that is the children's."""
    import torch
    import torch._dynamo
    from transformers import AutoTokenizer, Qwen3ForCausalLM  # noqa: F401  each is a module that is loaded when it is asked for

    import megapsft.checkpoint.hf_save
    import megapsft.cli
    import megapsft.evaluate.during_training
    import megapsft.train.loop  # noqa: F401

    torch.set_num_threads(1)


def fork(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a child whose output goes to `log`, at its end; the child's process id."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():  # Python 3.12 warns of any thread; those here are of tokenizers, which knows of forks
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)  # what it starts is ended with it
        os.environ[LAUNCHED] = str(parent)
        die_with_launcher()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        status = 0
    except BaseException:  # noqa: BLE001  the child ends here whatever it was; the log says why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait() -> Ended:
    """Wait until any child ends."""
    pid, status, used = os.wait4(-1, 0)
    return Ended(pid, status == 0, used.ru_utime + used.ru_stime)


def end(pid: int) -> None:
    """Kill a child and what it started."""
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
