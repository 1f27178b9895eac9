"""Runs in the server's interpreter, never in ours: SGLang's launcher, kept on loopback, and ended with who started it.

    python serve.py PARENT_PID --model-path ... --host 127.0.0.1 --port ... (arguments of sglang.launch_server)

With CUDA SGLang's own processes import this file once more before anything else, as `spawn` has it; what stands at its end holds
for them too. Without it they are forked, and import nothing again.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

STAND_INS = Path(__file__).resolve().parent / "cpu"
ON_CPU = (  # torch's own operators everywhere: the compiled kernels for CPUs are not in the package registry
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--max-total-tokens", "16384", "--max-running-requests", "64"),
    "--sleep-on-idle",  # or each scheduler keeps a core busy, which training shares, while nothing is asked
)


def die_with(parent: int) -> None:
    """Be killed when the thread that started this process ends, which is one of `parent` (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also where this process is stopped
    if os.getppid() != parent:  # it was gone before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def stay_on_loopback() -> None:
    """Let the stores of torch.distributed listen where they are reached, and not on every interface of the machine."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # the function of that name hides it
    store = rendezvous.TCPStore

    def on_loopback(host_name: str, port: int, world_size: int | None = None, is_master: bool = False, *rest, **options):
        if is_master and host_name in ("127.0.0.1", "localhost") and "master_listen_fd" not in options:
            listening = socket.socket()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", port))
            listening.listen()
            options["master_listen_fd"] = listening.detach()
        return store(host_name, port, world_size, is_master, *rest, **options)

    rendezvous.TCPStore = on_loopback


def fork_its_processes() -> None:
    """Let SGLang's processes have what this one has imported: a server starts in half the time, and in less memory.

    It asks for `spawn`, which CUDA needs. Where another thread runs by then, a fork would not be safe, and it gets it.
    """
    forking: list[int] = []
    os.register_at_fork(before=lambda: forking.append(os.getpid()), after_in_child=lambda: die_with(forking[-1]))
    set_start_method = multiprocessing.set_start_method

    def fork_instead(method: str | None, force: bool = False) -> None:
        alone = len(os.listdir("/proc/self/task")) == 1
        set_start_method("fork" if method == "spawn" and alone else method, force)

    multiprocessing.set_start_method = fork_instead


def prepare_cpu(arguments: list[str]) -> list[str]:
    """What a machine without CUDA needs: stand-ins for packages that need it, and arguments, before those of the user."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(STAND_INS))
    ranks = int(arguments[arguments.index("--tp-size") + 1]) if "--tp-size" in arguments else 1
    if ranks > 1:  # or SGLang wants a NUMA node for each
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] or cores[:1] for rank in range(ranks)]
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, share)) for share in shares))
    return [*ON_CPU, *arguments]


def main() -> None:
    die_with(int(sys.argv[1]))
    arguments = sys.argv[2:]
    import torch

    if not torch.cuda.is_available():
        arguments = prepare_cpu(arguments)
        if sys.platform == "linux":
            fork_its_processes()
    sys.argv[1:] = arguments
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ != "__main__":
    die_with(os.getppid())  # SGLang's processes ask for it too, seconds later, which is too late where it is ended as it starts
stay_on_loopback()
if __name__ == "__main__":
    main()
