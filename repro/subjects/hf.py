"""``hf:<org>/<name>[@revision]`` or ``hf:./folder``: transformers models, safetensors only.

Remote code is never trusted; a token is read by huggingface_hub from the environment
(``HF_TOKEN``) and passes through no file of ours.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from repro.errors import BadInput, Fault, MissingResource
from repro.subjects import Subject, SubjectInfo, _llm

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def describe(rest: str) -> SubjectInfo:
    """Describe a folder or a hub model; no torch, and from the hub at most the config."""
    folder = _local_folder(rest)
    if folder is None:
        return _describe_hub(rest)
    config = _llm.read_config(folder / "config.json", f"hf:{rest}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise MissingResource(
            f"hf:{rest}: no *.safetensors in {folder}; only safetensors are loaded, save the model "
            "with save_pretrained(folder)"
        )
    if not any(any(folder.glob(name)) for name in ("tokenizer.json", "tokenizer.model", "vocab.*")):
        raise MissingResource(
            f"hf:{rest}: no tokenizer in {folder}; save it there with "
            "tokenizer.save_pretrained(folder)"
        )
    return SubjectInfo(
        name=f"hf:{rest}",
        kind="llm",
        revision=_llm.content_hash(folder),
        max_length=_llm.max_length(config, f"hf:{rest}"),
        parameters=_llm.safetensors_size(weights),
    )


def is_remote(rest: str) -> bool:
    """Tell whether describing a subject asks the hub."""
    return _local_folder(rest) is None


def load(rest: str, *, device: str = "auto", dtype: str = "auto") -> Subject:
    """Load a folder offline, or a hub model from the cache or the hub."""
    info = describe(rest)
    folder = _local_folder(rest)
    if folder is not None:
        return _llm.load_llm(info, str(folder), device=device, dtype=dtype)
    name = rest.partition("@")[0]
    return _llm.load_llm(info, name, device=device, dtype=dtype, revision=info.revision)


def _local_folder(rest: str) -> Path | None:
    """Return the folder that ``rest`` means, or None for a hub name."""
    path = Path(rest).expanduser()
    if path.is_dir():
        return path
    if rest.startswith((".", "/", "~", os.sep)) or path.is_file():
        raise BadInput(
            Fault(f"hf:{rest}", "a local subject", "an existing folder with config.json", rest)
        )
    return None


def _describe_hub(rest: str) -> SubjectInfo:
    if not _HUB_NAME.fullmatch(rest):
        raise BadInput(
            Fault(
                "subjects",
                "hf:",
                "<org>/<name>, <org>/<name>@<revision> or a folder (./name)",
                rest,
            )
        )
    name, _, revision = rest.partition("@")
    config_path = _hub_file(name, "config.json", revision or None)
    config = _llm.read_config(config_path, f"hf:{rest}")
    # The hub cache keeps a file under snapshots/<commit>/<file>.
    commit = config_path.parent.name
    _check_weights(name, commit)
    return SubjectInfo(
        name=f"hf:{rest}",
        kind="llm",
        revision=commit,
        max_length=_llm.max_length(config, f"hf:{rest}"),
        parameters=_llm.parameter_count(config),
    )


def _hub_file(name: str, file: str, revision: str | None) -> Path:
    """Return a file from the hub cache, else fetch it, else say how to get it."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(name, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        _reach_hub()
        return Path(hub.hf_hub_download(name, file, revision=revision, etag_timeout=5))
    except (OSError, ValueError) as error:
        raise _missing(name, revision, error) from error


def _reach_hub() -> None:
    """Raise OSError at once where there is no way to the hub; its client retries for 20 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5)
    except urllib.error.HTTPError:
        return  # an answer, whatever it says


def _check_weights(name: str, commit: str) -> None:
    """Raise unless safetensors of this commit are in the cache or listed by the hub."""
    import huggingface_hub as hub

    for file in ("model.safetensors", "model.safetensors.index.json"):
        if isinstance(hub.try_to_load_from_cache(name, file, revision=commit), str):
            return
    try:
        _reach_hub()
        files = hub.HfApi().model_info(name, revision=commit, timeout=5).siblings or []
    except (OSError, ValueError) as error:
        raise _missing(name, commit, error) from error
    if not any(entry.rfilename.endswith(".safetensors") for entry in files):
        raise MissingResource(
            f"hf:{name}: the hub has no safetensors for it; only safetensors are loaded"
        )


def _missing(name: str, revision: str | None, error: Exception) -> MissingResource:
    from huggingface_hub import errors

    at = f" --revision {revision}" if revision else ""
    fetch = f"`hf download {name}{at}`"
    if isinstance(error, errors.GatedRepoError):
        return MissingResource(
            f"hf:{name}: gated; accept its licence at https://huggingface.co/{name}, set HF_TOKEN "
            f"in the environment, then fetch it with {fetch}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return MissingResource(
            f"hf:{name}: not on the hub, or private; check the name, or set HF_TOKEN in the "
            "environment"
        )
    return MissingResource(
        f"hf:{name}: not in the local cache and the hub cannot be reached "
        f"({type(error).__name__}); fetch it where there is a network with {fetch}, or copy its "
        f"folder here and use hf:./<folder>"
    )


def known() -> list[str]:
    """Return the hub models that lie in the local cache."""
    import huggingface_hub as hub

    try:
        found: Any = hub.scan_cache_dir().repos
    except (OSError, ValueError):
        return []
    return sorted(repo.repo_id for repo in found if repo.repo_type == "model")
