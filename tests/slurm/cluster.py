"""A real Slurm of several nodes on one machine: python -m tests.slurm.cluster up | down | run COMMAND ...

Every node is a network, UTS, mount and process namespace of its own, with its address, host name, /etc/hosts, /dev/shm and
processes. The controller, munge and the bridge that joins the nodes are in one more. So all that runs is found by namespace and
ended by namespace, nothing else is touched, and nothing listens but on the bridge. It needs root and Slurm: `make test-slurm`.

Several clusters on one machine are told apart by MEGAPSFT_SLURM_NUMBER.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapsft.errors import Refused

NODES = 6
UP_SECONDS, DOWN_SECONDS = 60, 20
SLURMD_PORT = 16818
CONTROLLER, HERE = 254, 253  # the last byte of their addresses; node n has n
MARKER = "made-by-megapsft-tests"  # a folder without it is not ours to remove
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"))

SLURM_CONF = """\
ClusterName=megapsft{number}
SlurmctldHost=controller({subnet}.254)
SlurmctldPort=16817
SlurmdPort={port}
SrunPortRange=60001-63000
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=6
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
ReturnToService=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
# cred_expire: a job that is requeued waits for so many seconds, 120 by default
# ReturnToService=1: a node that crashed comes back by itself, one that was set down stays down
# config_overrides: more CPUs than the machine has

NODE = """
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
mount -t tmpfs tmpfs /dev/shm
hostname {node}
slurmd -N {node} -D &
while :; do wait; sleep 1; done
"""  # the first process of the node reaps what Slurm's steps leave behind


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes node1, node2, ... of 4 CPUs each, all in one partition.

    Args:
        folder: of configuration, keys, logs and state; removed by `down`.
        number: tells clusters on one machine apart; 0 to 255.
        nodes: how many.
    """

    folder: Path
    number: int = 0
    nodes: int = NODES

    @classmethod
    def of_environment(cls, worker: int = 0) -> Cluster:
        """As MEGAPSFT_SLURM_NUMBER and MEGAPSFT_SLURM_FOLDER say; workers of pytest-xdist have one each."""
        number = int(os.environ.get("MEGAPSFT_SLURM_NUMBER", "0")) + worker
        folder = Path(os.environ.get("MEGAPSFT_SLURM_FOLDER") or tempfile.gettempdir()) / f"megapsft-slurm-{number}"
        return cls(folder=folder.resolve(), number=number)

    @property
    def names(self) -> list[str]:
        return [f"node{index}" for index in range(1, self.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """What clients of Slurm need."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCHED}

    @property
    def controller_log(self) -> Path:
        return self.folder / "log" / "slurmctld.log"

    def up(self) -> None:
        """Start it, in place of what an earlier one left behind, and wait until all nodes are idle.

        Raises:
            Refused: not root, no Slurm, no namespaces, or the folder is somebody else's.
        """
        self._refuse()
        self.down()
        self._write_folder()
        self._make_network()
        self._in_controller("munged", *self._munged_options())
        self._in_controller("unshare", "--uts", "sh", "-c", "hostname controller && exec slurmctld -c")
        for node in self.names:
            self._start(node)
        wait_until(lambda: self.states() == dict.fromkeys(self.names, "idle"), UP_SECONDS, self._why_not_up)

    def down(self) -> None:
        """End all of its processes, and remove its namespaces and its folder; nothing where it is not there."""
        spaces = [space for space in spaces_there() if space.startswith(f"{self._prefix}-")]
        wait_until(lambda: not kill_all(spaces), DOWN_SECONDS, lambda: f"processes in {spaces} do not die")
        if (Path("/sys/class/net") / self._prefix).exists():
            ip("link", "delete", self._prefix)
        for space in spaces:
            ip("netns", "delete", space)
        if (self.folder / MARKER).exists():
            shutil.rmtree(self.folder)

    def states(self) -> dict[str, str]:
        """node -> idle, mixed, allocated, down, ...; empty where no controller answers."""
        if not (self.folder / "slurm.conf").exists():  # clients would look for one elsewhere, for a minute
            return {}
        listed = self.slurm("sinfo", "--Node", "--noheader", "--Format=NodeList:40,StateLong:40", check=False)
        return dict(line.split() for line in listed.splitlines())

    def slurm(self, *command: str, check: bool = True, seconds: float = 60) -> str:
        """Standard output of a client of Slurm (sbatch, scontrol, ...).

        Raises:
            RuntimeError: it failed, and `check`; with what it said.
        """
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def kill(self, node: str) -> None:
        """The node crashes: all of its processes are gone at once."""
        space = f"{self._prefix}-{node}"
        wait_until(lambda: not kill_all([space]), DOWN_SECONDS, lambda: f"processes of {node} do not die")

    def start(self, node: str) -> None:
        """A node that crashed starts again, and is waited for."""
        self._start(node)
        up = ("idle", "mixed", "allocated", "completing")
        wait_until(lambda: self._answers(node) and self.states().get(node) in up, UP_SECONDS, self._why_not_up)

    def unplug(self, node: str) -> None:
        """The node goes on, but reaches no other, and none reaches it."""
        ip("-n", self._controller, "link", "set", node, "down")

    def plug(self, node: str) -> None:
        """It does again."""
        ip("-n", self._controller, "link", "set", node, "up")
        wait_until(lambda: self._answers(node), UP_SECONDS, self._why_not_up)

    def on(self, node: str, *command: str, check: bool = True, seconds: float = 60) -> str:
        """Standard output of a command in all namespaces of the node: what it mounts, all jobs on that node see.

        Raises:
            RuntimeError: it failed, and `check`; with what it said. Or the node is not up.
        """
        init = self._init(node)
        if init is None:
            raise RuntimeError(f"{node} is not up")
        enter = ("nsenter", "--target", str(init), "--net", "--uts", "--mount", "--pid", "--")
        return self.slurm(*enter, *command, check=check, seconds=seconds)

    def processes(self, node: str) -> list[int]:
        """Process ids, as this machine numbers them, of all that runs on the node."""
        return processes_in(f"{self._prefix}-{node}")

    @property
    def _prefix(self) -> str:
        return f"psft{self.number}"

    @property
    def _controller(self) -> str:
        return f"{self._prefix}-controller"

    @property
    def _subnet(self) -> str:
        return f"10.77.{self.number}"

    def _answers(self, node: str) -> bool:
        """Whether its slurmd takes connections."""
        try:
            socket.create_connection((f"{self._subnet}.{self.names.index(node) + 1}", SLURMD_PORT), timeout=1).close()
        except OSError:
            return False
        return True

    def _init(self, node: str) -> int | None:
        """The first process in the node's own tree."""
        for process in self.processes(node):
            try:
                status = Path(f"/proc/{process}/status").read_text()
            except OSError:  # it has ended
                continue
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if len(numbers) > 2 and numbers[-1] == "1":
                return process
        return None

    def _refuse(self) -> None:
        if os.geteuid() != 0:
            raise Refused(f"a cluster made by user {os.geteuid()}", "needs root, for namespaces", "use sudo make test-slurm")
        missing = [program for program in NEEDED if shutil.which(program, path=SEARCHED) is None]
        if missing:
            raise Refused(", ".join(missing), "not installed here", "use make test-slurm, which installs Debian's packages")
        tried = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true")
        done = subprocess.run(tried, capture_output=True, text=True)
        if done.returncode:
            raise Refused(
                f"{' '.join(tried)}: {done.stderr.strip()}",
                "namespaces are not permitted here",
                "use a machine, or a container with --privileged",
            )
        if self.folder.exists() and not (self.folder / MARKER).exists():
            raise Refused(str(self.folder), "is not of an earlier cluster", "remove it, or name another in MEGAPSFT_SLURM_FOLDER")

    def _write_folder(self) -> None:
        self.folder.mkdir(parents=True, mode=0o755)
        (self.folder / MARKER).touch()
        for name in ("munge", "state", "log", "spool", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "munge" / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "munge.key").chmod(0o400)
        addresses = ["127.0.0.1 localhost", f"{self._subnet}.{CONTROLLER} controller"]
        addresses += [f"{self._subnet}.{number} {node}" for number, node in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(addresses) + "\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # there is no DNS to wait for
        nodes = [
            f"NodeName={node} NodeAddr={self._subnet}.{number} CPUs=4 RealMemory=8000 State=UNKNOWN"
            for number, node in enumerate(self.names, 1)
        ]
        values = {"number": self.number, "subnet": self._subnet, "port": SLURMD_PORT, "folder": self.folder}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(nodes="\n".join(nodes), **values))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")  # named, and not used

    def _munged_options(self) -> list[str]:
        munge = self.folder / "munge"
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        return [f"--{option}={munge / name}" for option, name in files.items()] + [f"--log-file={self.folder}/log/munged.log"]

    def _make_network(self) -> None:
        controller, subnet = self._controller, self._subnet
        ip("netns", "add", controller)
        ip("-n", controller, "link", "set", "lo", "up")
        ip("-n", controller, "link", "add", "bridge", "type", "bridge")
        ip("-n", controller, "addr", "add", f"{subnet}.{CONTROLLER}/24", "dev", "bridge")
        ip("-n", controller, "link", "set", "bridge", "up")
        ip("link", "add", self._prefix, "type", "veth", "peer", "name", "machine", "netns", controller)
        ip("-n", controller, "link", "set", "machine", "master", "bridge", "up")
        ip("addr", "add", f"{subnet}.{HERE}/24", "dev", self._prefix)
        ip("link", "set", self._prefix, "up")
        for number, node in enumerate(self.names, 1):
            space = f"{self._prefix}-{node}"
            ip("netns", "add", space)
            ip("-n", controller, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", controller, "link", "set", node, "master", "bridge", "up")
            ip("-n", space, "addr", "add", f"{subnet}.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def _in_controller(self, *command: str) -> None:
        self.slurm("ip", "netns", "exec", self._controller, *command)

    def _start(self, node: str) -> None:
        spaces = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        script = NODE.format(folder=self.folder, node=node)
        with (self.folder / "log" / f"{node}.err").open("w") as errors:
            subprocess.Popen(
                ["ip", "netns", "exec", f"{self._prefix}-{node}", *spaces, "bash", "-euc", script],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )

    def _why_not_up(self) -> str:
        logs = [self.controller_log, *sorted((self.folder / "log").glob("node*.err"))]
        return "\n".join([f"nodes: {self.states()}", *(f"{log}:\n{tail(log)}" for log in logs)])


def ip(*arguments: str) -> str:
    """Standard output of `ip`."""
    done = subprocess.run(("ip", *arguments), env=os.environ | {"PATH": SEARCHED}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def spaces_there() -> list[str]:
    """Names of all network namespaces of this machine that have one."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def processes_in(space: str) -> list[int]:
    return [int(process) for process in ip("netns", "pids", space).split()]


def kill_all(spaces: Sequence[str]) -> list[int]:
    """Kill what is in these namespaces; the processes that were there, which may take a moment to be gone."""
    found = [process for space in spaces for process in processes_in(space)]
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return found


def wait_until(condition: Callable[[], object], seconds: float, why: Callable[[], str]) -> None:
    """Until it holds.

    Raises:
        TimeoutError: it did not, and why.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:g} s: {why()}")
        time.sleep(0.1)


def tail(path: Path, lines: int = 40) -> str:
    """The last lines of a file, which may not be there."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no such file)"


def run(clusters: Sequence[Cluster], command: Sequence[str]) -> int:
    """The command's exit code, with the clusters up while it runs, and down afterwards, however it ended."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for cluster in clusters:
            cluster.up()
        return subprocess.run(command, env=os.environ | clusters[0].environment).returncode
    finally:
        for cluster in clusters:
            cluster.down()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("up", help="start it, and print what to export")
    actions.add_parser("down", help="end it")
    parser_of_run = actions.add_parser("run", help="up, a command, down")
    parser_of_run.add_argument("--clusters", type=int, default=1, help="so many of them, for as many workers of pytest-xdist")
    parser_of_run.add_argument("command", nargs=argparse.REMAINDER)
    helps = {
        "kill": "the node crashes",
        "start": "a crashed node starts again",
        "unplug": "take its network away",
        "plug": "give it back",
        "on": "run a command in the node's namespaces",
    }
    for action, text in helps.items():
        parser_of_action = actions.add_parser(action, help=text)
        parser_of_action.add_argument("node")
        if action == "on":
            parser_of_action.add_argument("command", nargs=argparse.REMAINDER)
    given, cluster = parser.parse_args(arguments), Cluster.of_environment()
    if given.action == "run":
        return run([Cluster.of_environment(worker) for worker in range(given.clusters)], given.command)
    if given.action == "on":
        print(cluster.on(given.node, *given.command), end="")
    elif "node" in given:
        getattr(cluster, given.action)(given.node)
    else:
        getattr(cluster, given.action)()
    if given.action == "up":
        print("\n".join(f"export {name}={value}" for name, value in cluster.environment.items() if name != "PATH"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as error:
        sys.exit(f"cluster: {error}")
