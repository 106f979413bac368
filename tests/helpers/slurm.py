"""A real Slurm with accounting on this machine: its daemons listen on loopback only, its files are in one folder."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "sbatch")
MISSING = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
REASON = (
    f"no {', '.join(MISSING)} (Debian: slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge slurmdbd "
    "slurm-wlm-mysql-plugin mariadb-server)"
)
NODES = 2
START_SECONDS = 60.0


class LoopbackSlurm:
    """Nodes n1 and n2 of one machine, which claim 4 CPUs each, whatever that has.

    Args:
        folder: an empty one that every user can enter.
        settings: further lines of slurm.conf, partitions among them.
        proctrack: how Slurm finds a step's processes, `pgid` or `cgroup`.
    """

    def __init__(self, folder: Path, settings: str = "", proctrack: str = "pgid") -> None:
        self.folder, self.settings, self.proctrack = folder, settings, proctrack
        self._ports = _free_ports(3 + NODES)
        self._is_up = False
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __enter__(self) -> "LoopbackSlurm":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all jobs, then the daemons in the reverse order of their start."""
        if self._is_up:
            self.ask("scancel", "--user", getpass.getuser())
            self.ask("scancel", "--signal=KILL", "--user", getpass.getuser())
            _wait(lambda: not self.ask("squeue", "--noheader"), 20)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def _start(self) -> None:
        folder, environment = self.folder, self.environment
        munge, database = folder / "munge", folder / "db"
        folder.chmod(0o755)
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        (folder / "control").mkdir(mode=0o700)
        for node in range(1, NODES + 1):
            (folder / "spool" / f"n{node}").mkdir(parents=True)
        names = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", *(f"--{option}={munge / name}" for option, name in names.items()))

        user, database_port = getpass.getuser(), self._ports[2]
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={database}", f"--user={user}"]
        install.append("--auth-root-authentication-method=normal")
        subprocess.run(install, env=environment, check=True, capture_output=True)
        socket_file = folder / "db.sock"
        self._daemon(
            *("mariadbd", "--no-defaults", f"--datadir={database}", f"--socket={socket_file}", f"--user={user}"),
            *(f"--port={database_port}", "--bind-address=127.0.0.1", "--skip-name-resolve"),
            *(f"--pid-file={folder / 'db.pid'}", "--innodb-lock-wait-timeout=900", "--innodb-buffer-pool-size=32M"),
        )
        statements = (
            "create database slurm; create user slurm@'127.0.0.1' identified by 'x'; "
            "grant all on slurm.* to slurm@'127.0.0.1'"
        )
        client = ["mariadb", "--no-defaults", f"--socket={socket_file}", f"--user={user}", f"--execute={statements}"]
        assert _wait(
            lambda: subprocess.run(client, env=environment, capture_output=True).returncode == 0, START_SECONDS
        )

        accounting = folder / "slurmdbd.conf"
        accounting.write_text(self._accounting(user))
        accounting.chmod(0o600)
        (folder / "slurm.conf").write_text(self._configuration(user))
        (folder / "cgroup.conf").write_text("CgroupAutomount=yes\n")
        self._daemon("slurmdbd", "-D")
        assert _wait(lambda: bool(self.ask("sacctmgr", "--noheader", "list", "user")), START_SECONDS)
        self.ask("sacctmgr", "--immediate", "add", "cluster", "loopback")
        self.ask("sacctmgr", "--immediate", "add", "account", "tests", "cluster=loopback")
        self.ask("sacctmgr", "--immediate", "add", "user", user, "account=tests")
        self._daemon("slurmctld", "-D")
        for node in range(1, NODES + 1):
            self._daemon("slurmd", "-D", "-N", f"n{node}")
        idle = f"idle {NODES}"
        self._is_up = _wait(
            lambda: self.ask("sinfo", "--noheader", "--partition=debug", "--format=%T %D") == idle, START_SECONDS
        )
        assert self._is_up, f"see the logs in {folder}"

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _accounting(self, user: str) -> str:
        return f"""\
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={self._ports[1]}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={self._ports[2]}
StorageUser=slurm
StoragePass=x
StorageLoc=slurm
CommunicationParameters=NoInAddrAny
PidFile={self.folder}/slurmdbd.pid
"""

    def _configuration(self, user: str) -> str:
        """slurm.conf; a requeued job waits until the credential of its last start has expired, here 5 s."""
        host = socket.gethostname()
        lines = f"""\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self._ports[0]}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser={user}
SlurmdParameters=config_overrides
StateSaveLocation={self.folder}/control
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
ProctrackType=proctrack/{self.proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1,sched_interval=1
ReturnToService=2
MinJobAge=2
MpiDefault=none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self._ports[1]}
AccountingStoragePass={self.folder}/munge/sock
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
{self.settings}
"""
        for node in range(1, NODES + 1):
            address = f"NodeAddr=127.0.0.1 Port={self._ports[2 + node]}"
            lines += f"NodeName=n{node} NodeHostname={host} {address} CPUs=4 RealMemory=1000\n"
        return lines


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it holds within this time."""
    limit = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True
