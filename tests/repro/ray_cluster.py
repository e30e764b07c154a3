"""A Ray cluster of several raylets on this host, with processes that tests may kill."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Cluster:
    """Raylets of one CPU each, the first of them with the head, all on addresses of this host.

    Args:
        nodes: Number of raylets.
        environment: Environment of every process.
        job_server: Start the dashboard, which takes jobs.
    """

    def __init__(
        self, nodes: int, environment: dict[str, str], *, job_server: bool = False
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            **environment,
            # As in an activated environment: the entry point of a job is plain `python`.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]),
            "RAY_USAGE_STATS_ENABLED": "0",
            # One secret for all; without it, what others of this user ran would decide.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._count = nodes
        dashboard = free_port()
        self.job_server = f"http://127.0.0.1:{dashboard}"
        self._head = ["--head", f"--port={self.address.rpartition(':')[2]}"]
        self._head.append(f"--include-dashboard={str(job_server).lower()}")
        self._head += [f"--dashboard-port={dashboard}"] if job_server else []
        self.repair()

    def repair(self) -> None:
        """Start what is missing; without its head, everything anew."""
        if not self.nodes or not self.processes(self.nodes[0], "gcs_server"):
            self.stop()
            self.nodes = [self._start(1, *self._head)]
            self._wait_for_raylet(self.nodes[0])
        for number in range(1, self._count):
            if number < len(self.nodes) and self.processes(self.nodes[number], "raylet"):
                continue
            for old in self.nodes[number : number + 1]:
                _kill(old)
            self.nodes[number : number + 1] = [self._start(number + 1, f"--address={self.address}")]
        for node in self.nodes[1:]:
            self._wait_for_raylet(node)

    def processes(self, node: subprocess.Popen[bytes], name: str) -> list[int]:
        """Return the ids of a node's processes whose name or command begins with a text."""
        import psutil

        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(node.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if name in child.name() or name in " ".join(child.cmdline()[:1]):
                        found.append(child.pid)
        return found

    def stop(self) -> None:
        """Kill all that is left of it."""
        for node in self.nodes:
            _kill(node)

    def _start(self, host: int, *options: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
        command += ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
        return subprocess.Popen(
            [*command, f"--node-ip-address=127.0.0.{host}"],
            # A raylet without its head ends itself after so long.
            env={**self.environment, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_the_tests,  # noqa: PLW1509 - one call to the system
        )

    def _wait_for_raylet(self, node: subprocess.Popen[bytes]) -> None:
        wait_for(lambda: bool(self.processes(node, "raylet")), node)


def _end_with_the_tests() -> None:
    """Have the system end this process, and Ray its children, when its parent is killed."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _kill(node: subprocess.Popen[bytes]) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    node.kill()
    node.wait()


def free_port() -> int:
    """Return a port of localhost that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 90.0
) -> None:
    """Wait until a condition holds; fail if the process ends or it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None or condition(), "it ended"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
