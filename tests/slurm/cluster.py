"""A real Slurm on this machine from Debian's packages: one node or several, made-up GPUs, all in a folder of its own.

Whatever belongs to a cluster, its daemons, its jobs and their processes, carries the path of its slurm.conf in the
environment, by which it is found and ended; the machine's own Slurm, where there is one, is never touched.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PREFIX = "prefopt-slurm-"
GPU_MODELS = {"a100": 2, "h200": 2}  # devices 0 and 1, 2 and 3
# The one of profiles/slurm, another, and one whose jobs preempt those of the first two.
PARTITIONS = {"main": 1, "other": 1, "urgent": 2}

# `cred_expire`: a requeued job waits so long before it starts again, two minutes by default.
CONFIG = """
ClusterName=prefopt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
MinJobAge=7200
KillWait=10
{nodes}
{partitions}
"""
NODE = (
    "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} "
    "Gres={resources} State=UNKNOWN"
)
DEVICE = "NodeName={node} Name=gpu Type={model} File={root}/gpu{number}\n"
# The plugin strips SLURM_CONF, like every other variable of Slurm, from the environment of the `srun` in its jobs.
SRUN = '#!/bin/sh\nSLURM_CONF={root}/slurm.conf exec {srun} "$@"\n'


class Unavailable(Exception):
    """Why no Slurm can run on this machine."""


class Cluster:
    """A running Slurm.

    Args:
        root: the folder that holds all of it.
        nodes: names of its nodes, each a daemon on this machine.
    """

    def __init__(self, root: Path, nodes: Sequence[str]) -> None:
        self.root, self.nodes = root, nodes
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SNAKEMAKE"))},
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}:/usr/sbin",
        }

    def call(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's programs prints."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0 or not check, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def jobs(self) -> list[dict[str, str]]:
        """Every job since the cluster started, as `scontrol show job` describes it, and the rule it runs."""
        # A job that ends between two lines of the answer is no error.
        lines = self.call("scontrol", "--details", "--oneliner", "show", "job", check=False).splitlines()
        jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line.startswith("JobId=")]
        for job in jobs:
            job["Rule"] = re.sub(r"^rule_|_wildcards_.*$", "", job.get("Comment", ""))
        return jobs

    def of_rule(self, rule: str, after: str = "0") -> list[dict[str, str]]:
        """Jobs of a rule with a larger number than `after`, oldest first."""
        jobs = [job for job in self.jobs() if job["Rule"] == rule and int(job["JobId"]) > int(after)]
        return sorted(jobs, key=lambda job: int(job["JobId"]))

    def last_number(self) -> str:
        """The number of the youngest job."""
        return max((job["JobId"] for job in self.jobs()), key=int, default="0")

    def log(self) -> str:
        """The end of the daemons' logs, for the message of a failed test."""
        return "\n".join(path.read_text()[-3000:] for path in sorted((self.root / "log").glob("*.log")))


def wait_for(what: str, condition: Callable[[], Any], timeout: float = 300.0, poll: float = 0.3) -> Any:
    """Waits until the condition gives something true, and returns that.

    Raises:
        AssertionError: it did not in time.
    """
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout:.0f} s for {what}"
        time.sleep(poll)
    return value


def install() -> None:
    """Installs Slurm where that is possible and it is missing.

    Raises:
        Unavailable: there is none and none can be installed, or this is not root, who alone makes devices and users'
            jobs.
    """
    if os.getuid() != 0:
        raise Unavailable("a Slurm of one's own needs root")
    if not missing_programs():
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"no {', '.join(missing_programs())}, and no apt-get to install them by")
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        result = subprocess.run(
            ["apt-get", *command], env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        if result.returncode != 0:
            raise Unavailable(f"apt-get {command[0]} failed: {(result.stderr.splitlines() or ['no message'])[-1]}")
    if missing_programs():
        raise Unavailable(f"no {', '.join(missing_programs())} after the installation of {', '.join(PACKAGES)}")


def missing_programs() -> list[str]:
    """Slurm's programs that are not there."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@contextmanager
def running_cluster(count: int = 1) -> Iterator[Cluster]:
    """A Slurm of so many nodes, and its end.

    Raises:
        Unavailable: this machine does not let devices be made.
    """
    end_leftovers()
    # Sockets have short names, and munged wants a path that others may enter.
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    root.chmod(0o755)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cluster = Cluster(root, [f"node{number}" for number in range(1, count + 1)])
        try:
            write_configuration(root, cluster.nodes)
            start(cluster)
            yield cluster
        finally:
            end(root)


def write_configuration(root: Path, nodes: Sequence[str]) -> None:
    """What the daemons read, and the devices that they lend."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool", "log", "munge", "bin"):
        (root / name).mkdir()
    key = root / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    models = [model for model, count in GPU_MODELS.items() for _ in range(count)]
    for number in range(len(models)):
        try:
            # Clones of /dev/null: Slurm takes nothing but device files.
            os.mknod(root / f"gpu{number}", mode=0o020666, device=os.makedev(1, 3))
        except PermissionError as error:
            raise Unavailable(f"no device file can be made: {error}") from error
    controller_port, *ports = free_ports(1 + len(nodes))
    memory = psutil.virtual_memory().available // 2**20
    node = {
        "host": host,
        "resources": ",".join(f"gpu:{model}:{count}" for model, count in GPU_MODELS.items()),
        # Less than there is, so that a tight machine does not drain its node.
        **{"cpus": os.cpu_count(), "memory": memory * 3 // 4},
    }
    values = {
        **{"root": root, "host": host, "controller_port": controller_port},
        "nodes": "\n".join(NODE.format(node=name, port=port, **node) for name, port in zip(nodes, ports, strict=True)),
        "partitions": "\n".join(
            f"PartitionName={name} Nodes={','.join(nodes)} PriorityTier={priority} MaxTime=INFINITE"
            for name, priority in PARTITIONS.items()
        ),
    }
    (root / "slurm.conf").write_text(CONFIG.format(**values))
    devices = [
        DEVICE.format(node=name, model=model, root=root, number=number)
        for name in nodes
        for number, model in enumerate(models)
    ]
    (root / "gres.conf").write_text("".join(devices))
    wrapper = root / "bin" / "srun"
    wrapper.write_text(SRUN.format(root=root, srun=shutil.which("srun")))
    wrapper.chmod(0o755)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(cluster: Cluster) -> None:
    """Starts the daemons and waits until the node takes jobs."""
    root = cluster.root
    munge = [f"--{name}={root / 'munge' / file}" for name, file in (("socket", "socket"), ("key-file", "key"))]
    munge += [f"--{name}={root / 'munge' / name}" for name in ("pid-file", "log-file", "seed-file")]
    cluster.call("munged", "--force", *munge)
    cluster.call("slurmctld")
    for name in cluster.nodes:
        (root / "spool" / name).mkdir()
        cluster.call("slurmd", "-N", name)
    states = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"]
    idle = ["idle"] * len(cluster.nodes)
    try:
        wait_for("idle nodes", lambda: cluster.call(*states, check=False).split() == idle, timeout=60)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.log()}") from error


def end(root: Path) -> None:
    """Ends all processes of a cluster and removes its folder."""
    for _ in range(2):  # a step's manager may start one more before it ends
        processes = processes_of(root)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
    shutil.rmtree(root, ignore_errors=True)


def processes_of(root: Path) -> list[psutil.Process]:
    """Every process that carries this cluster's configuration in its environment, but this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == str(root / "slurm.conf"):
                found.append(process)
    return found


def end_leftovers() -> None:
    """Ends the clusters of test sessions that were killed: those whose lock nobody holds."""
    for lock_file in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        with lock_file.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            end(lock_file.parent)
