"""The artifact store: what calibration and training stages leave, made once and shared.

    <root>/keys/<key>.json        which content an identity led to
    <root>/content/<sha256>/      artifact.safetensors + artifact.json

``key`` is the identity of the inputs (see ``repro.plan``), the folder name the hash of the outcome.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repro.errors import MachineFault, MissingResource
from repro.keys import canonical_json, jsonable
from repro.method import Artifact
from repro.store import Warn, _silent, now, write_atomically


class _Folder:
    """Files below a folder of this machine or of one that is mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.root / name, data)


class _Remote:
    """Files below a URL, by fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise MissingResource(f"artifacts: {url} cannot be opened: {error}") from error
        self.root = path.rstrip("/")

    def read(self, name: str) -> bytes:
        return bytes(self._files.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        path = f"{self.root}/{name}"
        try:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            # A reader sees the whole file or none, also where writing takes its time.
            temporary = f"{path}.{uuid.uuid4().hex}"
            self._files.pipe_file(temporary, data)
            self._files.mv(temporary, path)
        except OSError as error:
            raise MachineFault(f"{path}: cannot be written: {error}") from error


class ArtifactStore:
    """Artifacts under one folder or URL; two processes that make the same one do no harm.

    Args:
        root: A folder, or a URL that fsspec knows (``s3://bucket/repro``, ``gs://...``).
        warn: Receives a line about what cannot be read.

    Raises:
        MissingResource: If the package for the URL is not installed.
    """

    def __init__(self, root: str | Path, *, warn: Warn = _silent) -> None:
        self.root = str(root)
        self.warn = warn
        self._files = _Remote(self.root) if "://" in self.root else _Folder(Path(root))

    def get(self, key: str) -> Artifact | None:
        """Return a stored artifact, None if there is none or its content was altered."""
        pointer = _pointer(key)
        try:
            content = json.loads(self._files.read(pointer))["content"]
            folder = f"content/{content}"
            tensors = self._files.read(f"{folder}/artifact.safetensors")
            metadata = self._files.read(f"{folder}/artifact.json")
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror or error
            raise MachineFault(f"{self.root}/{pointer}: cannot be read: {reason}") from error
        except (ValueError, KeyError, TypeError):
            self.warn(f"{self.root}/{pointer}: unreadable; the artifact is made again")
            return None
        if _content_hash(tensors, metadata) != content:
            self.warn(f"{self.root}/{folder}: differs from its hash; the artifact is made again")
            return None
        from safetensors.torch import load

        return Artifact(tensors=load(tensors), metadata=json.loads(metadata))

    def get_or_make(
        self, key: str, make: Callable[[], Artifact], *, identity: Any = None
    ) -> Artifact:
        """Return the artifact of a key, made and stored first if need be.

        What is returned is always what the store would read, so that the first run and a resumed
        one compute with the same bits.

        Args:
            key: Identity of the inputs, hexadecimal.
            make: Called if the store has no whole artifact under the key.
            identity: JSON-able inputs, kept beside the content for the reader.
        """
        stored = self.get(key)
        if stored is not None:
            return stored
        self._put(key, make(), identity)
        stored = self.get(key)
        if stored is None:
            raise MachineFault(f"{self.root}: an artifact just written cannot be read back")
        return stored

    def _put(self, key: str, artifact: Artifact, identity: Any) -> None:
        from safetensors.torch import save

        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in artifact.tensors.items()
        }
        data = save(tensors)
        metadata = canonical_json(jsonable(artifact.metadata)).encode()
        content = _content_hash(data, metadata)
        self._files.write(f"content/{content}/artifact.safetensors", data)
        self._files.write(f"content/{content}/artifact.json", metadata)
        # Last: what it points at is whole.
        pointer = {"content": content, "identity": jsonable(identity), "created": now()}
        self._files.write(_pointer(key), json.dumps(pointer).encode())


def _pointer(key: str) -> str:
    return f"keys/{key}.json"


def _content_hash(tensors: bytes, metadata: bytes) -> str:
    inner = hashlib.sha256(tensors).hexdigest() + hashlib.sha256(metadata).hexdigest()
    return hashlib.sha256(inner.encode()).hexdigest()
