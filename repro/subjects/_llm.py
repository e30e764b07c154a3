"""What the schemes share: device and dtype, content hashes, loading a causal language model."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.errors import BadInput, Fault, MissingResource
from repro.subjects import Subject, SubjectInfo

if TYPE_CHECKING:
    import torch

#: Files of a model folder that decide what the model computes; a card or a licence does not.
_CONTENT = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "*.safetensors",
    "*.safetensors.index.json",
)
_DTYPES = ("bfloat16", "float16", "float32")


def resolve_device(device: str) -> torch.device:
    """Return the device that a name means; ``auto`` is CUDA where there is one."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise BadInput(Fault("subjects", "device", "auto, cpu, cuda or cuda:<n>", device))
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise MissingResource(
            f"subjects: device {device} is not on this machine; use device: cpu, or run where "
            "torch sees a CUDA device"
        )
    return chosen


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return the dtype that a name means; ``auto`` is bfloat16."""
    import torch

    name = "bfloat16" if dtype == "auto" else dtype
    if name not in _DTYPES:
        raise BadInput(Fault("subjects", "dtype", f"auto, {', '.join(_DTYPES)}", dtype))
    return getattr(torch, name)


def content_hash(folder: Path) -> str:
    """Return the first 16 hexadecimal digits of SHA-256 over the files that make the model."""
    files = sorted({path for pattern in _CONTENT for path in folder.glob(pattern)})
    parts = [f"{path.name}:{_file_hash(path, *_stamp(path))}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; size and time of change only key the cache."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_config(path: Path, where: str) -> dict[str, Any]:
    """Return a model's ``config.json`` as a dict."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingResource(f"{where}: cannot read {path}: {error.strerror}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(Fault(where, str(path), "valid JSON in UTF-8", str(error))) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput(
            Fault(where, str(path), "a transformers config with model_type", type(config).__name__)
        )
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language part of a config (multimodal models nest it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def max_length(config: Mapping[str, Any], where: str) -> int:
    """Return the positions that a model accepts."""
    value = text_config(config).get("max_position_embeddings")
    if not isinstance(value, int) or value < 1:
        raise BadInput(Fault(where, "max_position_embeddings", "a positive integer", value))
    return value


def parameter_count(config: Mapping[str, Any]) -> int | None:
    """Count the weights of a Llama-like decoder from its config; None if a width is not given."""
    part = text_config(config)
    try:
        hidden, layers = part["hidden_size"], part["num_hidden_layers"]
        heads, vocabulary = part["num_attention_heads"], part["vocab_size"]
        kv_heads = part.get("num_key_value_heads") or heads
        head_dim = part.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        mlp = 3 * hidden * part["intermediate_size"]
        embeddings = vocabulary * hidden * (1 if part.get("tie_word_embeddings") else 2)
        return int(layers * (attention + mlp + 2 * hidden) + embeddings + hidden)
    except (KeyError, TypeError):
        return None


def safetensors_size(files: Iterable[Path]) -> int | None:
    """Count the parameters in safetensors files by their headers, without reading weights."""
    total = 0
    for path in files:
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length)) if length < 100_000_000 else {}
        except (OSError, ValueError):
            return None
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for extent in entry.get("shape", ()):
                    size *= extent
                total += size
    return total or None


def load_llm(
    info: SubjectInfo, source: str, *, device: str, dtype: str, revision: str | None = None
) -> Subject:
    """Load model and tokenizer from a folder, or from the hub cache, in evaluation mode.

    Args:
        info: What ``describe`` returned.
        source: Local folder or hub name.
        device: Device name or ``auto``.
        dtype: Floating type or ``auto``.
        revision: Commit of a hub name; None for a folder.

    Raises:
        MissingResource: If files lack or are damaged; no weight is ever initialised at random.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, kind = resolve_device(device), resolve_dtype(dtype)
    where: dict[str, Any] = {"revision": revision} if revision else {"local_files_only": True}
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=kind,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **where,
            )
            model, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    except Exception as error:
        # Libraries raise a dozen types for damaged or absent files; the user needs one line.
        if "out of memory" in str(error).lower():
            raise
        raise MissingResource(
            f"subjects: {info.name}: cannot load {source}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    lacking = sorted(report.get("missing_keys", ()))
    if lacking:
        raise MissingResource(
            f"subjects: {info.name}: {source} has no weights for {len(lacking)} tensors of its "
            f"config, first {lacking[0]}; fetch the files again"
        )
    return Subject(
        info=info,
        model=model.to(target).eval().requires_grad_(False),
        tokenizer=tokenizer,
        device=target,
        dtype=kind,
    )


class quiet:
    """Switch transformers' progress bars off inside the block; the live display is ours."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was_on = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        from transformers.utils import logging

        if self._was_on:
            logging.enable_progress_bar()
