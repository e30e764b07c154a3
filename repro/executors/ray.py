"""The Ray executor: one worker per device, on this machine or on a running cluster.

The driver hands out cells (``_pool``) to actors (``_actor``), each of which runs them in a process
of its own. Only a fault of the machine is tried again; a cell's own error never is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from repro.errors import BadInput, Fault, MissingResource
from repro.executors import Session
from repro.executors._pool import Pool, Request, head_is_gone
from repro.plan import PlannedCell

OBJECT_STORE_BYTES = 100 * 2**20  # records travel, tensors do not


def execute(session: Session) -> None:
    """Run the pending cells of a session.

    Raises:
        MissingResource: If Ray is not installed.
        BadInput: If the cluster at the address cannot be joined.
        MachineFault: If the store cannot be written, or the cluster's head is gone.
        KeyboardInterrupt: On Ctrl-C; everything finished is stored.
    """
    try:
        import ray
    except ImportError:
        raise MissingResource(
            "executor ray: Ray is not installed; pip install 'repro[cluster]', or --executor inline"
        ) from None
    pending = session.pending()
    if not pending:
        return
    # Ray prints the death of a worker to standard output, where tables and JSON go; the session
    # tells it in one line.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        cluster(ray, session.address),
    ):
        try:
            for request, cells in _phases(session, pending):
                Pool(ray, session, request, cells).drain()
        except ConnectionError as error:  # of a client (ray://), which has no RayError for it
            raise head_is_gone(session.address or "local") from error


@contextlib.contextmanager
def cluster(ray: Any, address: str | None, *, cpus: int | None = None) -> Iterator[None]:
    """Start a local cluster, or join one; stop only what was started here.

    Args:
        ray: The package.
        address: Of a running cluster, None for a local one.
        cpus: What a local one offers; by default what this process may use.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from repro.environment import usable_cpus

    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address is None:
        ray.init(
            address="local",
            num_cpus=cpus or usable_cpus(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **common,
        )
    else:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            rule = "a running Ray cluster, such as auto or ray://host:10001"
            raise BadInput(Fault("--address", "the address", rule, address, reason)) from error
    if in_main_thread:  # Ray puts its own handlers; a run ends by KeyboardInterrupt
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _phases(
    session: Session, cells: Sequence[PlannedCell]
) -> list[tuple[Request, list[PlannedCell]]]:
    """Return what runs together: where several workers share a GPU, timings have it to themselves.

    A worker on the CPU takes a whole node, since two at once would spoil each other's timings and
    the number of threads is part of a record.
    """
    if session.plan.device == "cpu":
        return [(Request(whole_node=True), list(cells))]
    held: dict[float, list[PlannedCell]] = {}
    for planned in cells:
        held.setdefault(session.plan.gpus_of(planned), []).append(planned)
    return [(Request(gpus=gpus), held[gpus]) for gpus in sorted(held)]
