"""Write many files so that all of them are new or none is, as far as a file system allows."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from repro.errors import MachineFault


def write_all(files: Mapping[Path, bytes], *, remove: Iterable[Path] = ()) -> list[Path]:
    """Write every file beside its place first, then move all of them there.

    A full disk or a read-only folder shows while the copies are written, when nothing of the old
    results has been touched yet. A file whose content is the same is left alone.

    Args:
        files: Path -> content.
        remove: Files that the new ones make void; missing ones are skipped.

    Returns:
        All paths of ``files``, in order.

    Raises:
        MachineFault: If a file cannot be written; says which.
    """
    staged: list[tuple[str, Path]] = []
    path = Path()
    try:
        for path, data in files.items():
            if _same(path, data):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            staged.append((temporary, path))
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
        while staged:
            temporary, path = staged[0]
            os.replace(temporary, path)
            staged.pop(0)
        for path in remove:
            path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MachineFault(
            f"{path}: cannot be written: {reason}; free space or make the folder writable, then "
            "run `repro report` again. The records are kept"
        ) from error
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return list(files)


def check_writable(folder: Path) -> None:
    """Try whether ``write_all`` could write there, so that hours of work do not end in a fault.

    Raises:
        MachineFault: If not; nothing is left behind either way.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise MachineFault(
            f"{folder}: cannot be written: {error.strerror or error}; make the folder writable, "
            "choose another with --results, or run with --no-report"
        ) from error


def _same(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False
