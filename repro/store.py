"""The run store: what a run leaves under ``runs/``, so that nothing finished is computed twice.

    runs/.lock                                      one driver at a time
    runs/<name>/<profile>/<device>.json             index: resolved manifest, cells in order
    runs/<name>/<profile>/<device>.live             see ``repro.status``
    runs/cells/<key[:2]>/<key>/<environment>/       one cell on one machine
        items.jsonl                                 finished items, appended per batch
        record.json                                 the finished record, by atomic rename
        log.txt                                     traceback of a failure
        fatal.txt                                   stack of a process that a signal ended
        output.txt                                  what the cell printed
        *.corrupt                                   what could not be read, set aside
    runs/artifacts/                                 see ``repro.artifacts``

Cells are kept by key and not by profile: profiles share the cells that coincide.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from repro.errors import MachineFault, ReproError
from repro.keys import canonical_json, digest, jsonable

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]

RECORD_SCHEMA = 1
FSYNC_SECONDS = 1.0
# A worker that lost its cluster's head lives on for 60 s by Ray's default.
LOCK_SECONDS = 90.0
# Outcomes that another try may change; every other one is reused.
RETRIED = frozenset({"crashed", "infra", "implied", "not_run"})
# Outcomes of a cell that ran and gave nothing that counts.
FAILED = frozenset({"oom", "timeout", "numerical", "crashed", "infra", "invalid"})
# Folders of a run store that are no runs; measurements keep what they can make again in ``cache``.
_NOT_RUNS = frozenset({"cells", "artifacts", "cache"})
Warn = Callable[[str], None]


class CellLocked(ReproError):
    """Another process, perhaps one on its way out, is writing the cell."""


def _silent(text: str) -> None:
    del text


@contextlib.contextmanager
def _machine_faults(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one clear line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MachineFault(
            f"{path}: cannot be written: {reason}; free space or choose another folder with --runs"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old or the new one, also after a crash.

    The folder is not synced: should the power fail, the old file may stand again, which costs
    computing it once more.

    Raises:
        MachineFault: If the folder is read-only or the disk is full.
    """
    with _machine_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _encode_line(key: str, value: Mapping[str, Any]) -> bytes:
    """Return ``{"crc":"<8 hex>","key":...,"value":...}``: JSON that proves itself whole."""
    body = canonical_json({"key": key, "value": jsonable(value)})[1:].encode()
    return b'{"crc":"%08x",' % zlib.crc32(body) + body + b"\n"


def _is_whole(line: bytes) -> bool:
    """Tell whether a line, its end included, is as it was written."""
    if line[:8] != b'{"crc":"' or line[16:18] != b'",' or line[-1:] != b"\n":
        return False
    return line[8:16] == b"%08x" % zlib.crc32(line[18:-1])


def _decode_lines(lines: list[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, value) of whole lines, parsed at once: a call per line costs three times that."""
    for entry in json.loads(b"[" + b",".join(lines) + b"]"):
        yield entry["key"], entry["value"]


class ItemFile:
    """The finished items of one cell: append-only, flushed per batch, fsynced within a second.

    Opening reads what is there. A line that is torn or altered goes to ``items.jsonl.corrupt``
    and its item counts as not done; every other line is kept. One process writes at a time.
    """

    def __init__(
        self, path: Path, *, warn: Warn = _silent, wait_seconds: float = LOCK_SECONDS
    ) -> None:
        self.path = path
        self._values: dict[str, dict[str, Any]] = {}
        self._synced_at = 0.0
        self._unsynced = False
        self._timer: threading.Timer | None = None
        self._guard = threading.Lock()
        with _machine_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab")
        try:
            self._lock(wait_seconds)
            self._read(warn)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the stored value of an item, or None."""
        return self._values.get(key)

    def put(self, batch: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Append one finished batch of (item key, JSON-able value).

        Raises:
            MachineFault: If the disk is full or the folder read-only; no part of the batch is kept.
        """
        lines = [(key, _encode_line(key, value)) for key, value in batch]
        with self._guard, _machine_faults(self.path):
            end = self._stream.tell()
            try:
                self._stream.write(b"".join(line for _, line in lines))
                self._stream.flush()
            except OSError:
                self._drop_from(end)
                raise
            self._sync_soon()
        for key, line in lines:
            # What a resumed run would read, not what the caller holds: both must agree.
            self._values[key] = json.loads(line)["value"]

    def close(self) -> None:
        """Sync and release the file."""
        with self._guard, _machine_faults(self.path):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._stream.closed:
                if self._unsynced:
                    self._sync()
                self._stream.close()

    def _lock(self, wait_seconds: float) -> None:
        # A killed driver's worker may still be about for a moment; the system frees its lock.
        deadline = time.monotonic() + wait_seconds
        while fcntl is not None:
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() >= deadline:
                    raise CellLocked(
                        f"{self.path}: another process is still writing this cell; "
                        "wait for it or stop it"
                    ) from None
                time.sleep(0.05)

    def _read(self, warn: Warn) -> None:
        with _machine_faults(self.path):
            data = self.path.read_bytes()
        lines = data.splitlines(keepends=True)
        whole = [_is_whole(line) for line in lines]
        good = list(itertools.compress(lines, whole))
        self._values.update(_decode_lines(good))
        bad = [number for number, fine in enumerate(whole) if not fine]
        if bad:
            self._set_aside([lines[number] for number in bad], good)
            count = f"{len(bad)} unreadable line{'s' if len(bad) > 1 else ''}"
            where = f"{self.path}:{bad[0] + 1}"
            warn(f"{where}: {count} set aside in {self.path.name}.corrupt and computed again")

    def _set_aside(self, bad: list[bytes], good: list[bytes]) -> None:
        with _machine_faults(self.path):
            aside = self.path.with_name(self.path.name + ".corrupt")
            with aside.open("ab") as stream:
                stream.writelines(line if line.endswith(b"\n") else line + b"\n" for line in bad)
            # In place, so that the lock stays on the file that everyone opens.
            kept = b"".join(good)
            with self.path.open("r+b") as stream:
                stream.write(kept)
                stream.truncate(len(kept))
                stream.flush()
                os.fsync(stream.fileno())
            self._stream.seek(0, os.SEEK_END)

    def _drop_from(self, end: int) -> None:
        """Cut a half-written batch, and what the stream still buffers of it."""
        descriptor = os.dup(self._stream.fileno())
        try:
            with contextlib.suppress(OSError):
                self._stream.close()
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
        finally:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            self._stream = self.path.open("ab")

    def _sync_soon(self) -> None:
        """Sync now if the last sync is a second old, else by a timer."""
        self._unsynced = True
        if time.monotonic() - self._synced_at >= FSYNC_SECONDS:
            self._sync()
        elif self._timer is None:
            self._timer = threading.Timer(FSYNC_SECONDS, self._sync_from_timer)
            self._timer.daemon = True
            self._timer.start()

    def _sync_from_timer(self) -> None:
        with self._guard:
            self._timer = None
            if not self._stream.closed:
                # The next put or close meets the same error and reports it.
                with contextlib.suppress(OSError):
                    self._sync()

    def _sync(self) -> None:
        os.fsync(self._stream.fileno())
        self._synced_at = time.monotonic()
        self._unsynced = False


class CellFolder:
    """One cell on one machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_path = path / "record.json"
        self.items_path = path / "items.jsonl"
        self.log_path = path / "log.txt"
        self.fatal_path = path / "fatal.txt"
        self.output_path = path / "output.txt"

    def items(self, *, warn: Warn = _silent) -> ItemFile:
        """Open the cell's items for reading and appending."""
        return ItemFile(self.items_path, warn=warn)

    def read_record(self, *, warn: Warn = _silent) -> dict[str, Any] | None:
        """Return the finished record, None if there is none; a corrupt one is set aside."""
        try:
            data = self.record_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MachineFault(f"{self.record_path}: cannot be read: {error.strerror}") from error
        try:
            record = json.loads(data)
            whole = record.pop("checksum") == digest(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            aside = self.record_path.with_name("record.json.corrupt")
            warn(f"{self.record_path}: unreadable; set aside as {aside.name} and made again")
            with _machine_faults(self.record_path):
                os.replace(self.record_path, aside)
            return None
        return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write the finished record by atomic rename."""
        body = jsonable(record)
        body["checksum"] = digest(body)
        write_atomically(self.record_path, json.dumps(body, ensure_ascii=False).encode() + b"\n")

    def read_log(self) -> str:
        """Return the traceback of a failure, empty if there is none."""
        return _text_of(self.log_path)

    def read_output(self) -> str:
        """Return what the cell printed, empty if nothing."""
        return _text_of(self.output_path)

    def write_output(self, data: bytes) -> None:
        """Keep what the cell printed."""
        write_atomically(self.output_path, data)

    def write_log(self, text: str) -> None:
        """Keep the traceback of a failure."""
        write_atomically(self.log_path, text.encode(errors="replace"))

    def append_items(self, lines: bytes) -> None:
        """Keep whole lines of an ``ItemFile`` that grows on another file system."""
        with _machine_faults(self.items_path):
            self.items_path.parent.mkdir(parents=True, exist_ok=True)
            with self.items_path.open("ab") as stream:
                stream.write(lines)
                stream.flush()
                os.fsync(stream.fileno())

    @contextlib.contextmanager
    def fatal_errors(self) -> Iterator[None]:
        """Keep the stack in ``fatal.txt`` if a signal such as a segmentation fault ends the process."""
        with _machine_faults(self.fatal_path):
            self.path.mkdir(parents=True, exist_ok=True)
            stream = self.fatal_path.open("w")
        before = faulthandler.is_enabled()
        faulthandler.enable(stream)
        try:
            yield
        finally:
            faulthandler.disable()
            if before and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            stream.close()
            with contextlib.suppress(OSError):
                self.fatal_path.unlink()

    def take_fatal(self) -> str:
        """Return the stack that a dead process left and make it the log; empty if there is none."""
        try:
            text = self.fatal_path.read_text(errors="replace").strip()
            self.fatal_path.unlink()
        except FileNotFoundError:
            return ""
        if text:
            self.write_log(text + "\n")
        return text

    def forget(self) -> None:
        """Set record and items aside (``*.previous``), so that the cell starts anew."""
        with _machine_faults(self.path):
            for path in (self.record_path, self.items_path):
                if path.exists():
                    os.replace(path, path.with_name(path.name + ".previous"))
            self.fatal_path.unlink(missing_ok=True)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


class RunStore:
    """A folder of runs. Reading needs no lock; a run holds ``lock()``."""

    def __init__(self, root: str | Path = "runs", *, warn: Warn = _silent) -> None:
        self.root = Path(root)
        self.warn = warn

    def cell(self, key: str, environment: str) -> CellFolder:
        """Return the folder of one cell on one machine."""
        return CellFolder(self.root / "cells" / key[:2] / key / environment)

    def folders(self, key: str) -> list[CellFolder]:
        """Return the folders of one cell on every machine that has a record of it."""
        places = (self.root / "cells" / key[:2] / key).glob("*/record.json")
        return [CellFolder(place.parent) for place in sorted(places)]

    def finished(self, key: str, environment: str) -> dict[str, Any] | None:
        """Return the record that makes computing the cell needless, or None."""
        record = self.cell(key, environment).read_record(warn=self.warn)
        return None if record is None or record.get("status") in RETRIED else record

    def done(self, keys: Iterable[str]) -> set[str]:
        """Return the cells that some machine has finished, to the last item."""
        found = set()
        for key in keys:
            records = [folder.read_record() or {} for folder in self.folders(key)]
            whole = [record for record in records if not is_cut(record)]
            if {record.get("status", "not_run") for record in whole} - RETRIED:
                found.add(key)
        return found

    def write_index(self, plan: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Keep the resolved manifest and the ordered cells of a run (``Plan.to_json()``)."""
        path = self.root / plan["name"] / plan["profile"] / f"{plan['device']}.json"
        index = {
            "schema": RECORD_SCHEMA,
            "created": now(),
            "manifest": manifest,
            "cells": [{"key": cell["key"], "cell": cell["cell"]} for cell in plan["cells"]],
        }
        write_atomically(path, json.dumps(index, ensure_ascii=False).encode() + b"\n")

    def indexes(self, name: str, profile: str) -> list[dict[str, Any]]:
        """Return the indexes of a run, one per device type; an unreadable one is warned of."""
        found = []
        for path in sorted((self.root / name / profile).glob("*.json")):
            try:
                found.append(json.loads(path.read_bytes()))
            except (ValueError, OSError):
                self.warn(f"{path}: unreadable; run the manifest again to make it anew")
        return found

    def runs(self) -> list[tuple[str, str]]:
        """Return (name, profile) of every run in this folder."""
        places = {path.parent for path in self.root.glob("*/*/*.json")}
        found = [(place.parent.name, place.name) for place in places]
        return sorted(run for run in found if run[0] not in _NOT_RUNS)

    def records(self, name: str, profile: str) -> list[dict[str, Any]]:
        """Return the records of a run in the plan's order, of every machine that made some.

        A planned cell without a record appears as ``not_run``. ``cell`` holds the paper, profile
        and label of this run, also where the record was made for another profile.
        """
        found = []
        for index in self.indexes(name, profile):
            for entry in index["cells"]:
                found += self._records_of(entry)
        return found

    def _records_of(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        key, cell = entry["key"], entry["cell"]
        records = []
        for folder in self.folders(key):
            record = folder.read_record(warn=self.warn)
            if record is not None:
                records.append({**record, "cell": cell})
        # What one machine has left out, or failed at without a word on the cell, another has done.
        for nothing in ({"not_run", "infra"}, {"not_run"}):
            ran = [record for record in records if record["status"] not in nothing]
            if ran:
                return ran
        return records[:1] or [make_record(key, cell, "not_run", "planned and not run yet")]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one driver.

        Raises:
            ReproError: If another driver holds it; says which.
            MachineFault: If the folder cannot be written.
        """
        path = self.root / ".lock"
        with _machine_faults(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            stream = path.open("a+")
        with stream:
            try:
                if fcntl is not None:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise ReproError(
                    f"{self.root}: {holder} is running in this folder; "
                    "wait for it, or choose another one with --runs"
                ) from None
            with _machine_faults(path):
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
                stream.flush()
            yield


def make_record(
    key: str, cell: Mapping[str, Any], status: str, message: str = "", **body: Any
) -> dict[str, Any]:
    """Return a record of the form that the report reads; ``body`` holds what was measured."""
    return {
        "schema": RECORD_SCHEMA,
        "key": key,
        "cell": dict(cell),
        "status": status,
        "message": message,
        "metrics": {},
        **body,
    }


def is_cut(record: Mapping[str, Any]) -> bool:
    """Tell whether a cell ended early (``repro.settle``): it has no score of its own."""
    return bool(record.get("settled"))


def environment_key(environment: Mapping[str, Any]) -> str:
    """Return the folder name of a machine: its readable slug and what else results depend on."""
    versions = environment.get("versions") or {}
    told = {
        "device": environment.get("device_name"),
        "threads": environment.get("threads"),
        "libraries": {name: versions.get(name) for name in ("torch", "triton")},
    }
    return f"{environment.get('environment_id', 'unknown')}-{digest(told)[:6]}"


def now() -> str:
    """Return the date and time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
