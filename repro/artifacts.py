"""The artifact store: what calibration and training stages leave, made once and shared.

    <root>/keys/<key>.json        which content an identity led to
    <root>/content/<sha256>/      artifact.safetensors + artifact.json

``key`` is the identity of the inputs (see ``repro.plan``), the folder name the hash of the outcome.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repro.errors import MachineFault
from repro.keys import canonical_json, jsonable
from repro.method import Artifact
from repro.store import Warn, _silent, now, write_atomically


class ArtifactStore:
    """Artifacts under one folder; two processes that make the same one do no harm."""

    def __init__(self, root: str | Path, *, warn: Warn = _silent) -> None:
        self.root = Path(root)
        self.warn = warn

    def get(self, key: str) -> Artifact | None:
        """Return a stored artifact, None if there is none or its content was altered."""
        pointer = self._pointer(key)
        try:
            content = json.loads(pointer.read_bytes())["content"]
            folder = self.root / "content" / content
            tensors = (folder / "artifact.safetensors").read_bytes()
            metadata = (folder / "artifact.json").read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MachineFault(f"{pointer}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            self.warn(f"{pointer}: unreadable; the artifact is made again")
            return None
        if _content_hash(tensors, metadata) != content:
            self.warn(f"{folder}: differs from its hash; the artifact is made again")
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
        folder = self.root / "content" / content
        write_atomically(folder / "artifact.safetensors", data)
        write_atomically(folder / "artifact.json", metadata)
        pointer = {"content": content, "identity": jsonable(identity), "created": now()}
        write_atomically(self._pointer(key), json.dumps(pointer).encode())

    def _pointer(self, key: str) -> Path:
        return self.root / "keys" / f"{key}.json"


def _content_hash(tensors: bytes, metadata: bytes) -> str:
    inner = hashlib.sha256(tensors).hexdigest() + hashlib.sha256(metadata).hexdigest()
    return hashlib.sha256(inner.encode()).hexdigest()
