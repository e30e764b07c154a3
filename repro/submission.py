"""Run a manifest as a job of a Ray cluster, and bring its records back.

The checkout is shipped with the records that are here already, so that a resubmission resumes. The
records come back in the job's log, see ``repro.joblog``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from repro.errors import BadInput, Fault, MachineFault, MissingResource, ReproError
from repro.joblog import SENT, Inbox, Outbox
from repro.store import RunStore

AGENT_SECONDS = 60.0
# Tries in a row that bring nothing new, and for how long they go on at least.
RECONNECTS, RECONNECT_SECONDS = 20, 60.0
# What a job needs of a checkout; the links in ``repro`` are shipped as what they point at.
_SHIPPED = ("repro", "manifests", "pyproject.toml")


def submit(
    manifest: str | Path,
    *,
    address: str,
    profile: str,
    device: str = "auto",
    runs: str | Path = "runs",
    requirements: str | None = None,
    say: Callable[[str], None],
) -> str:
    """Send a run to a cluster; return the id of its job.

    Args:
        manifest: The manifest; checked here, before anything is sent.
        address: URL of the job server, such as ``http://head:8265``.
        profile: Profile of the manifest.
        device: ``auto`` is decided on the cluster.
        runs: Run store here; its records of this run go along.
        requirements: A file of packages that the cluster installs first (Ray's ``pip``).
        say: Receives lines of progress.

    Raises:
        BadInput: On a bad manifest, or if no job server answers at the address.
        MissingResource: If Ray is not installed.
    """
    from repro import manifest as manifests

    checked = manifests.load(manifest, profile=profile)
    client = _client(address)
    with tempfile.TemporaryDirectory(prefix="repro-job-") as folder:
        staged = Path(folder)
        shipped = _stage(staged, Path(manifest), RunStore(runs), checked.name, profile)
        runtime: dict[str, Any] = {"working_dir": str(staged)}
        if requirements is not None:
            runtime["pip"] = requirements
        say(f"sending the checkout and {shipped} records")
        command = f"python -m repro.submission {checked.name} {profile} {device}"
        return _send(client, address, entrypoint=command, runtime_env=runtime)


def _send(client: Any, address: str, **job: Any) -> str:
    """Hand a job in; a cluster that has just started takes some seconds until it takes any."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "No available agent" not in reason or time.monotonic() > deadline:
                raise MachineFault(f"submit: {address} took no job: {reason}") from error
            time.sleep(1.0)


def follow(
    job: str, *, address: str, runs: str | Path = "runs", say: Callable[[str], None]
) -> bool:
    """Show a job's progress until it ends and store its records.

    It may be called again, also for a job that ended: what is here and better is kept.

    Returns:
        Whether the job succeeded and all its files are here.

    Raises:
        BadInput: If no job server answers, or it knows no such job.
        MachineFault: If the connection stays broken, or the store cannot be written.
        KeyboardInterrupt: On Ctrl-C; the job goes on.
    """
    client = _client(address)
    try:
        client.get_job_status(job)
    except RuntimeError as error:
        raise BadInput(Fault("submit", "--attach", f"a job of {address}", job)) from error
    store = RunStore(runs, warn=say)
    with store.lock():
        ended, missing = _follow(client, job, store, say)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        say(
            f"job {job}: damaged in its log and missing here: {', '.join(missing[:3])}{more}; "
            f"`repro submit --attach {job} --address {address}` reads the log again, and a new "
            "submission computes what has no record"
        )
    succeeded = bool(ended.status == "SUCCEEDED")
    if not succeeded:
        reason = (ended.message or "").strip().splitlines()
        say(f"job {job}: {ended.status.value.lower()}; {reason[-1] if reason else 'see its log'}")
    return succeeded and not missing


def _follow(
    client: Any, job: str, store: RunStore, say: Callable[[str], None]
) -> tuple[Any, list[str]]:
    """Read the log until the job ends, from its start again where the connection breaks.

    Returns:
        What the server tells of the job, and the files that did not arrive whole.

    Raises:
        MachineFault: If try after try brings nothing new.
    """
    said, left = 0, RECONNECTS
    while True:
        lines = _Unsaid(said, say)
        try:
            return _follow_once(client, job, Inbox(store), lines)
        except _Broken as error:
            news = lines.count > said
            said = max(said, lines.count)
            left = RECONNECTS if news else left - 1
            if not left or not _answers(client, job, RECONNECT_SECONDS):
                attach = f"go on with --attach {job}"
                raise MachineFault(f"submit: the connection is lost: {error}; {attach}") from error
            if not news:
                time.sleep(RECONNECT_SECONDS / RECONNECTS)


def _follow_once(
    client: Any, job: str, inbox: Inbox, say: Callable[[str], None]
) -> tuple[Any, list[str]]:
    rest = asyncio.run(_read_log(_chunks(client, job), inbox, say))
    with _connection():
        state = client.get_job_info(job)
    if not state.status.is_terminal():
        # Ray ends the log as if it were whole when its head loses the machine of the job.
        raise _Broken(f"the log ends, but the job is {state.status.value.lower()}")
    if rest:
        _take(rest, inbox, say)
    missing = inbox.missing()
    if state.status == "SUCCEEDED" and not inbox.ended:
        missing.append("the end of the log")
    return state, missing


class _Broken(Exception):
    """The connection to the job broke: there is more to read."""


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Give all that a broken connection raises one type."""
    import aiohttp

    try:
        yield
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        raise _Broken(str(error) or type(error).__name__) from error


class _Unsaid:
    """Passes on the lines after the first ones, which were said before."""

    def __init__(self, skip: int, say: Callable[[str], None]) -> None:
        self.skip, self.say = skip, say
        self.count = 0

    def __call__(self, line: str) -> None:
        self.count += 1
        if self.count > self.skip:
            self.say(line)


def _answers(client: Any, job: str, seconds: float) -> bool:
    """Wait until the job server answers again; tell whether it does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(_Broken), _connection():
            client.get_job_status(job)
            return True
        time.sleep(1.0)
    return False


async def _chunks(client: Any, job: str) -> AsyncIterator[str]:
    # Here and not around the reader, whose own errors are none of the connection.
    with _connection():
        async for chunk in client.tail_job_logs(job):
            yield chunk


async def _read_log(chunks: AsyncIterator[str], inbox: Inbox, say: Callable[[str], None]) -> str:
    """Read to the end; return what follows the last line that is whole."""
    rest = ""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            _take(line, inbox, say)
    return rest


def _take(line: str, inbox: Inbox, say: Callable[[str], None]) -> None:
    text = inbox.take(line)
    if text is not None:
        say(text)


def _client(address: str) -> Any:
    _use_token()
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise MissingResource(
            "submit: Ray is not installed; pip install 'repro[cluster]'"
        ) from None
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise MissingResource(
            f"submit: {address} asks for a token; set RAY_AUTH_TOKEN to the cluster's, or copy its "
            "~/.ray/auth_token here"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        rule = "the URL of a Ray job server that answers, such as http://head:8265"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(Fault("submit", "--address", rule, address, reason)) from error


def _use_token() -> None:
    """Show the cluster's token where there is one, as ``ray.init`` does; its job client does not.

    Ray reads the mode when it is imported.
    """
    kept = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or kept.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _stage(staged: Path, manifest: Path, store: RunStore, name: str, profile: str) -> int:
    """Put together what the job needs; return how many records go along."""
    import repro

    checkout = Path(repro.__file__).parents[1]
    for part in _SHIPPED:
        source = checkout / part
        if source.is_dir():
            shutil.copytree(source, staged / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, staged / part)
    (staged / "manifests").mkdir(exist_ok=True)
    shutil.copy(manifest, staged / "manifests" / f"{name}.yaml")
    records = 0
    for index in store.indexes(name, profile):
        for entry in index["cells"]:
            for folder in store.folders(entry["key"]):
                target = staged / "runs" / folder.path.relative_to(store.root)
                target.mkdir(parents=True, exist_ok=True)
                for kept in SENT:
                    if (folder.path / kept).exists():
                        shutil.copy(folder.path / kept, target / kept)
                records += 1
    return records


def main(name: str, profile: str, device: str) -> int:
    """Run a shipped manifest on the cluster that this process is a job of."""
    from repro import runner

    store = RunStore("runs")
    outbox = Outbox(store, name, profile)
    outcome = runner.run(
        Path("manifests") / f"{name}.yaml",
        profile=profile,
        runs=store.root,
        executor="ray",
        device=device,
        address="auto",
        also=outbox,
    )
    outbox.close()
    return outcome.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ReproError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
