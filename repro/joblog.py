"""How the files of a run store travel in the log of a job: nothing but the job server is needed.

    @repro <name of the file below runs/> <part>/<parts> <crc of the whole> <base64 of zlib>
    @repro end

The job sends the files of a cell as the cell ends, its record last, and the second line when all
are; who follows the log stores them, at once or days later, unless what is here by then is better.
"""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.keys import digest, jsonable
from repro.store import RETRIED, CellFolder, RunStore, environment_key, write_atomically

if TYPE_CHECKING:
    from repro.plan import PlannedCell

MARK = "@repro"
# Ray cuts longer lines of a log.
LINE_BYTES = 8000
# Files of a cell that travel; the record last: what has one is complete.
SENT = ("items.jsonl", "log.txt", "output.txt", "record.json")
# What a job may write here, and nothing else: a log is no reason to trust paths.
_WORD = r"[A-Za-z0-9][\w.-]*"
_PLACE = (
    rf"(?:cells/[0-9a-f]{{2}}/[0-9a-f]{{64}}/{_WORD}/(?:{'|'.join(map(re.escape, SENT))})"
    rf"|{_WORD}/{_WORD}/(?:cpu|cuda)\.json)"
)
# Another writer's text may stand before a line of ours, if that one did not end its own.
_LINE = re.compile(rf"{MARK} (\S+) (\d+)/(\d+) ([0-9a-f]{{8}}) ([A-Za-z0-9+/=]*)$")
_END = f"{MARK} end"
_BROKEN_LINE = re.compile(rf"{MARK} ({_PLACE})\s.*")


def lines_of(name: str, data: bytes) -> Iterator[str]:
    """Yield the lines that carry a file of the run store."""
    text = base64.b64encode(zlib.compress(data)).decode()
    parts = [text[i : i + LINE_BYTES] for i in range(0, len(text), LINE_BYTES)]
    crc = f"{zlib.crc32(data):08x}"
    for number, part in enumerate(parts, 1):
        yield f"{MARK} {name} {number}/{len(parts)} {crc} {part}"


class Outbox:
    """A listener that writes the files of every finished cell into the job's log.

    Args:
        store: The run store of the job.
        name: Name of the run, whose indexes travel too.
        profile: Its profile.
        descriptor: Where to write; the standard output of a job is its log.
    """

    def __init__(self, store: RunStore, name: str, profile: str, descriptor: int = 1) -> None:
        self.store, self.descriptor = store, descriptor
        self.index = store.root / name / profile
        self._sent: set[Path] = set()

    def started(self, planned: PlannedCell, worker: str) -> None:
        self._send_index()

    def progress_of(self, planned: PlannedCell) -> Callable[[int, int], None]:
        return lambda done, total: None

    def finished(self, planned: PlannedCell, record: dict[str, Any], *, cached: bool) -> None:
        self._send_index()
        folder = None if cached else self._folder_of(planned.key, record)
        if folder is not None:
            for name in SENT:
                self._send(folder.path / name)

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        """Say that everything has been sent."""
        self._write(f"{_END}\n".encode())

    def _folder_of(self, key: str, record: dict[str, Any]) -> CellFolder | None:
        """Return the folder of the machine that made a record; others hold what was shipped."""
        if environment := record.get("environment"):
            return self.store.cell(key, environment_key(environment))
        # What did not run is of no machine, and lies in the folder of the driver's.
        made = jsonable(record)
        same = (folder for folder in self.store.folders(key) if folder.read_record() == made)
        return next(same, None)

    def _send_index(self) -> None:
        for path in self.index.glob("*.json"):
            if path not in self._sent:
                self._sent.add(path)
                self._send(path)

    def _send(self, path: Path) -> None:
        if path.exists():
            name = path.relative_to(self.store.root).as_posix()
            for line in lines_of(name, path.read_bytes()):
                self._write(f"{line}\n".encode())

    def _write(self, line: bytes) -> None:
        # Past every buffer and in one piece, so that another writer of the log cannot cut it; a
        # disk that is nearly full takes less than it is given.
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]


class Inbox:
    """Puts the files of one log, read from its start, where they belong in a run store.

    The files of a cell wait for their record: it tells whether they are to replace what is here.
    """

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self._parts: dict[str, list[str]] = {}
        self._waiting: dict[str, dict[str, bytes]] = {}  # folder of a cell -> name -> data
        self._damaged: set[str] = set()
        #: Whether the job has said that everything was sent: without it the log is cut.
        self.ended = False

    def take(self, line: str) -> str | None:
        """Take in a line; return what of it is not ours, None if it was ours alone."""
        if line.endswith(_END):  # another writer's text may stand before it
            self.ended = True
            return line.removesuffix(_END) or None
        found = _LINE.search(line)
        text = line if found is None else line[: found.start()]
        broken = _BROKEN_LINE.search(text)
        if broken is not None:
            self._damaged.add(broken[1])
            text = text[: broken.start()]
        if found is not None:
            self._take_part(*found.groups())
        return text if text or not (found or broken) else None

    def missing(self) -> list[str]:
        """Return the names of the files that did not arrive whole; to be asked at the log's end."""
        records = {f"{folder}/record.json" for folder in self._waiting}
        return sorted(self._damaged | set(self._parts) | records)

    def _take_part(self, name: str, part: str, parts: str, crc: str, text: str) -> None:
        if int(part) == 1:
            self._parts[name] = []
        self._parts.setdefault(name, []).append(text)
        if part != parts:
            return
        data = _decoded("".join(self._parts.pop(name)), crc)
        if data is not None and self._is_ours(name) and self._store(name, data):
            self._damaged.discard(name)
        else:
            self._damaged.add(name)

    def _is_ours(self, name: str) -> bool:
        """Tell whether a file may be written, also where links lead elsewhere."""
        if not re.fullmatch(_PLACE, name):
            return False
        root = self.store.root.resolve()
        return (root / name).resolve().is_relative_to(root)

    def _store(self, name: str, data: bytes) -> bool:
        """Keep a whole file, now or when its record is here; False if the record is none."""
        folder, _, file = name.rpartition("/")
        if file not in SENT:
            if _created(data) >= _created(_contents(self.store.root / name)):
                write_atomically(self.store.root / name, data)
            return True
        if file != "record.json":
            self._waiting.setdefault(folder, {})[file] = data
            return True
        record = _record_of(data)
        if record is not None:
            files = self._waiting.pop(folder, {})
            self._store_cell(CellFolder(self.store.root / folder), record, {**files, file: data})
        return record is not None

    def _store_cell(
        self, folder: CellFolder, record: dict[str, Any], files: dict[str, bytes]
    ) -> None:
        stored = folder.read_record(warn=self.store.warn)
        if stored is not None and _stays(stored, record):
            return
        items = folder.items_path
        here = _contents(items)
        for name, data in files.items():
            if name != items.name or _count_items(data) >= _count_items(here):
                write_atomically(folder.path / name, data)


def _decoded(text: str, crc: str) -> bytes | None:
    """Return the file that the parts carry, None if it is damaged."""
    try:
        data = zlib.decompress(base64.b64decode(text, validate=True))
    except (ValueError, zlib.error):
        return None
    return data if f"{zlib.crc32(data):08x}" == crc else None


def _contents(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _created(index: bytes) -> str:
    """Return when the index of a run was made, "" where it does not say."""
    try:
        return str(json.loads(index)["created"])
    except (ValueError, KeyError, TypeError):
        return ""


def _record_of(data: bytes) -> dict[str, Any] | None:
    """Return a record as ``CellFolder.read_record`` would, None if it would set it aside."""
    try:
        record: dict[str, Any] = json.loads(data)
        whole = record.pop("checksum") == digest(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _stays(stored: dict[str, Any], record: dict[str, Any]) -> bool:
    """Tell whether what is here is better than what arrives: final, or made later.

    The same record is no better: with it arrive the files that were damaged before.
    """
    if stored == record:
        return False
    newer = str(stored.get("created", "")) > str(record.get("created", ""))
    return newer or stored.get("status") not in RETRIED


def _count_items(data: bytes) -> int:
    return len(set(data.splitlines()))
