"""Two machines on one: network namespaces with addresses of their own, joined by a cable, and folders of their own.

The processes of a machine see its address and no other one, its `HOME`, `TMPDIR` and scene cache, and start in its
folder. They share the processor, the file system and the host name, which real machines do not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "INTERFACE",
    "Machine",
    "cannot_join_machines",
    "exchange_addresses",
    "joined_machines",
    "one_machine",
    "pull_cable",
]

# Name of the network interface in each namespace.
INTERFACE = "cable"
PORT = 29400


@dataclass
class Machine:
    """A network namespace, or none, with folders of its own.

    Attributes:
        folder: where its processes start; holds `home`, `tmp` and `cache`.
        address: under which the other machine sees it.
        namespace: name of the network namespace; None for the network of this process.
        started: its launchers.
    """

    folder: Path
    address: str = "127.0.0.1"
    namespace: str | None = None
    started: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for name in ("home", "tmp", "cache"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def launch(
        self,
        module: str,
        settings: Mapping[str, object],
        *,
        machines: Sequence[Machine] = (),
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        log: str = "output.log",
    ) -> subprocess.Popen[bytes]:
        """Start a module by torchrun, and return the launcher; what it prints is added to a file in `folder`.

        Args:
            module: what torchrun runs, as `cameo.recipes.lora_finetune`.
            settings: those of the training; written to `settings.yaml`.
            machines: all machines of the run, of which the first one has the address that they meet at.
            processes: on this machine.
            environment: further variables.
            log: name of the file.
        """
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        if len(machines) > 1:
            launcher += ["--nnodes", str(len(machines)), "--node_rank", str(machines.index(self))]
            launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{machines[0].address}:{PORT}"]
            # Ranks follow the order of these addresses, not --node_rank.
            launcher += ["--rdzv_id", "cameo", "--local_addr", self.address]
            # The host name, which all have in common, does not tell a machine that the address is its own.
            launcher += ["--rdzv_conf", f"is_host={self is machines[0]}"]
        else:
            launcher += ["--standalone"]
        (self.folder / "settings.yaml").write_text(json.dumps(dict(settings)), encoding="utf-8")
        command = [*launcher, "-m", module, "config=settings.yaml"]
        own = {"HOME": "home", "TMPDIR": "tmp", "CAMEO_CACHE": "cache"}
        variables = {**os.environ, **{name: str(self.folder / value) for name, value in own.items()}}
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning", **(environment or {})}
        if self.namespace is not None:
            variables["GLOO_SOCKET_IFNAME"] = INTERFACE
            command = ["ip", "netns", "exec", self.namespace, *command]
        with (self.folder / log).open("ab") as output:
            started = subprocess.Popen(
                command, cwd=self.folder, env=variables, stdout=output, stderr=output, start_new_session=True
            )
        self.started.append(started)
        return started

    def processes(self) -> dict[int, int]:
        """Ids of the running processes of the launchers that were started here, by their rank."""
        found: dict[int, int] = {}
        for launcher in self.started:
            with suppress(OSError):
                children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
                for child in children:
                    variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                    found |= {int(one[5:]): int(child) for one in variables if one.startswith(b"RANK=")}
        return found

    def printed(self, log: str = "output.log") -> str:
        """Return what its processes have printed."""
        return (self.folder / log).read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """Kill what was started here and still runs; torchrun's processes are not of its process group."""
        for process in self.processes().values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for launcher in self.started:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        if self.namespace is not None:
            listed = subprocess.run(
                ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
            )
            for process in listed.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)


def exchange_addresses(machines: list[Machine]) -> list[Machine]:
    """Let two machines exchange their addresses, and so their ranks; returns them in the order of their ranks."""
    first, second = machines
    for machine in machines:
        _ip("-n", str(machine.namespace), "address", "flush", "dev", INTERFACE)
    first.address, second.address = second.address, first.address
    for machine in machines:
        _give_address(machine)
    return [second, first]


def pull_cable(machine: Machine) -> None:
    """Cut the connection of a machine: what is sent is lost, and nobody is told."""
    _ip("-n", str(machine.namespace), "link", "set", INTERFACE, "down")


def cannot_join_machines() -> str | None:
    """Say why there can be no namespaces here; None where there can."""
    if shutil.which("ip") is None:
        return "needs the command ip of iproute2"
    name = f"cameo-{os.getpid()}-trial"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        made = subprocess.run(
            ["ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other"],
            capture_output=True,
            text=True,
            check=False,
        )
        subprocess.run(["ip", "netns", "del", name], check=True)
    return None if made.returncode == 0 else f"needs the right to make network namespaces ({made.stderr.strip()})"


@contextmanager
def one_machine(folder: Path) -> Iterator[Machine]:
    """Yield a machine in the network of this process; what it has started ends with the block."""
    machine = Machine(folder)
    try:
        yield machine
    finally:
        machine.end()


@contextmanager
def joined_machines(folder: Path) -> Iterator[list[Machine]]:
    """Yield two machines that are joined by a cable, with folders below `folder`; everything on them ends afterwards.

    Raises:
        CalledProcessError: if there can be none, see `cannot_join_machines`.
    """
    names = [f"cameo-{os.getpid()}-{number}" for number in range(2)]
    made: list[str] = []
    machines: list[Machine] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        peer = ["peer", "name", INTERFACE, "netns", names[1]]
        _ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", *peer)
        for number, name in enumerate(names):
            machines.append(Machine(folder / f"machine{number}", f"10.213.0.{number + 1}", name))
            _give_address(machines[-1])
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
        yield machines
    finally:
        for machine in machines:
            machine.end()
        for name in made:
            _ip("netns", "del", name)


def _give_address(machine: Machine) -> None:
    _ip("-n", str(machine.namespace), "address", "add", f"{machine.address}/24", "dev", INTERFACE)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
