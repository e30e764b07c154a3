"""Run a manifest as a job of a Ray cluster, and bring its records back.

The checkout is shipped with the records that are here already, so that a resubmission resumes. The
job writes the files of each finished cell into its own log, as lines that begin with ``@repro``; the
one that follows the log stores them, at once or days later: nothing but the job server is needed.

    @repro <name of the file below runs/> <part>/<parts> <crc of the whole> <base64 of zlib>
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.errors import BadInput, Fault, MachineFault, MissingResource, ReproError
from repro.store import RunStore, write_atomically

if TYPE_CHECKING:
    from repro.plan import PlannedCell

MARK = "@repro"
# Ray cuts longer lines of a log.
LINE_BYTES = 8000
AGENT_SECONDS = 60.0
RECONNECTS, RECONNECT_SECONDS = 20, 60.0
_LINE = re.compile(rf"{MARK} (\S+) (\d+)/(\d+) ([0-9a-f]{{8}}) (\S*)$")
# What a job may write here, and nothing else: a log is no reason to trust paths.
_PLACES = re.compile(
    r"cells/[0-9a-f]{2}/[0-9a-f]{64}/[\w.-]+/(record\.json|items\.jsonl|log\.txt|output\.txt)"
    r"|[\w.-]+/[\w.-]+/(cpu|cuda)\.json"
)
_KEPT = ("record.json", "items.jsonl", "log.txt", "output.txt")
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
    """Show a job's progress until it ends and store its records; tell whether it succeeded.

    It may be called again, also for a job that ended: what is here already is written over by the
    same.

    Raises:
        BadInput: If no job server answers, or it knows no such job.
        KeyboardInterrupt: On Ctrl-C; the job goes on.
    """
    client = _client(address)
    try:
        client.get_job_status(job)
    except RuntimeError as error:
        raise BadInput(Fault("submit", "--attach", f"a job of {address}", job)) from error
    inbox = Inbox(RunStore(runs))
    with inbox.store.lock():
        status = _follow(client, job, inbox, say)
    if status != "SUCCEEDED":
        reason = (client.get_job_info(job).message or "").strip().splitlines()
        say(f"job {job}: {status.value.lower()}; {reason[-1] if reason else 'see its log'}")
    return bool(status == "SUCCEEDED")


def _follow(client: Any, job: str, inbox: Inbox, say: Callable[[str], None]) -> Any:
    """Read the log until the job ends, from its start again where the connection breaks."""
    said = 0
    for left in reversed(range(RECONNECTS)):
        lines = _Unsaid(said, say)
        try:
            asyncio.run(_read_log(client.tail_job_logs(job), inbox, lines))
            return client.get_job_status(job)
        except (RuntimeError, OSError) as error:
            said = lines.count
            if not left or not _answers(client, job, RECONNECT_SECONDS):
                attach = f"go on with --attach {job}"
                raise MachineFault(f"submit: the connection is lost: {error}; {attach}") from error


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
        with contextlib.suppress(RuntimeError, OSError):
            client.get_job_status(job)
            return True
        time.sleep(1.0)
    return False


async def _read_log(chunks: AsyncIterator[str], inbox: Inbox, say: Callable[[str], None]) -> None:
    rest = ""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            if not inbox.take(line):
                say(line)
    if rest:
        say(rest)


class Inbox:
    """Puts the files of a job's log where they belong in a run store."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self._parts: dict[str, list[str]] = {}

    def take(self, line: str) -> bool:
        """Take in a line; tell whether it was one of ours. A damaged file is left out."""
        found = _LINE.match(line)
        if found is None:
            return False
        name, part, parts, crc, text = found.groups()
        if int(part) == 1:
            self._parts[name] = []
        self._parts.setdefault(name, []).append(text)
        if part != parts:
            return True
        joined = "".join(self._parts.pop(name))
        with contextlib.suppress(ValueError, zlib.error):
            data = zlib.decompress(base64.b64decode(joined, validate=True))
            if f"{zlib.crc32(data):08x}" == crc and _PLACES.fullmatch(name):
                write_atomically(self.store.root / name, data)
        return True


def lines_of(name: str, data: bytes) -> Iterator[str]:
    """Yield the lines that carry a file of the run store."""
    text = base64.b64encode(zlib.compress(data)).decode()
    parts = [text[i : i + LINE_BYTES] for i in range(0, len(text), LINE_BYTES)]
    crc = f"{zlib.crc32(data):08x}"
    for number, part in enumerate(parts, 1):
        yield f"{MARK} {name} {number}/{len(parts)} {crc} {part}"


class Outbox:
    """A listener that writes the files of every finished cell into the job's log."""

    def __init__(self, store: RunStore, name: str, profile: str, stream: Any) -> None:
        self.store, self.stream = store, stream
        self.index = store.root / name / profile
        self._sent: set[Path] = set()

    def started(self, planned: PlannedCell, worker: str) -> None:
        self._send_index()

    def progress_of(self, planned: PlannedCell) -> Callable[[int, int], None]:
        return lambda done, total: None

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        self._send_index()
        if not cached:
            for folder in self.store.folders(planned.key):
                # The record last: what has one is complete.
                for kept in sorted(_KEPT, key=lambda name: name == "record.json"):
                    self._send(folder.path / kept)

    def message(self, text: str) -> None:
        pass

    def _send_index(self) -> None:
        for path in self.index.glob("*.json"):
            if path not in self._sent:
                self._sent.add(path)
                self._send(path)

    def _send(self, path: Path) -> None:
        if path.exists():
            name = path.relative_to(self.store.root).as_posix()
            for line in lines_of(name, path.read_bytes()):
                print(line, file=self.stream)
            self.stream.flush()


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
                for kept in _KEPT:
                    if (folder.path / kept).exists():
                        shutil.copy(folder.path / kept, target / kept)
                records += 1
    return records


def main(name: str, profile: str, device: str) -> int:
    """Run a shipped manifest on the cluster that this process is a job of."""
    from repro import runner

    store = RunStore("runs")
    outbox = Outbox(store, name, profile, sys.stdout)
    outcome = runner.run(
        Path("manifests") / f"{name}.yaml",
        profile=profile,
        runs=store.root,
        executor="ray",
        device=device,
        address="auto",
        also=outbox,
    )
    return outcome.exit_code


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ReproError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
