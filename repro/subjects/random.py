"""``random:<architecture>``: the real architecture with random weights, for latency and memory.

``random:meta-llama/Llama-3.1-8B`` takes a shape from the table below, ``random:tiny`` a very
small one for tests, ``random:<path>`` a ``config.json`` or the folder that holds it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from repro.errors import BadInput, Fault, near_matches
from repro.subjects import Subject, SubjectInfo, _llm

_SEED = 0


def _llama3(factor: float, **shape: Any) -> dict[str, Any]:
    """A Llama 3.x config: shared vocabulary, positions and RoPE, own widths."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
    return base | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_parameters": rope} | shape


def _plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


#: Public architecture shapes; ``-Instruct`` variants share them.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _llama3(
        8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.2-1B": _llama3(
        32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-3B": _llama3(
        32.0,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _plain_rope(1000000.0),
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _plain_rope(1000000.0),
        "tie_word_embeddings": False,
    },
    "mistralai/Mistral-7B-v0.3": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _plain_rope(1000000.0),
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _plain_rope(10000.0),
        "tie_word_embeddings": True,
    },
}


def known() -> list[str]:
    """Return the architectures of the built-in table."""
    return sorted(ARCHITECTURES)


def describe(rest: str) -> SubjectInfo:
    """Describe an architecture; no torch."""
    config = _config(rest)
    text = json.dumps({"config": config, "seed": _SEED}, sort_keys=True)
    return SubjectInfo(
        name=f"random:{rest}",
        kind="llm",
        revision=f"random-{hashlib.sha256(text.encode()).hexdigest()[:12]}",
        max_length=_llm.max_length(config, f"random:{rest}"),
        trained=False,
        parameters=_llm.parameter_count(config),
    )


def load(rest: str, *, device: str = "auto", dtype: str = "auto") -> Subject:
    """Build the architecture with seeded random weights, directly on the device."""
    return build(_config(rest), describe(rest), device=device, dtype=dtype)


def build(
    config: dict[str, Any],
    info: SubjectInfo,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = _SEED,
) -> Subject:
    """Build a causal language model from a config dict with seeded random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    target, kind = _llm.resolve_device(device), _llm.resolve_dtype(dtype)
    devices = [target] if target.type == "cuda" else []
    try:
        values = {key: value for key, value in config.items() if key != "model_type"}
        real = AutoConfig.for_model(config["model_type"], **values)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            Fault(info.name, "config", "one transformers can build", str(error))
        ) from None
    with torch.random.fork_rng(devices=devices), target:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            real, dtype=kind, attn_implementation="sdpa", trust_remote_code=False
        )
    return Subject(
        info=info,
        model=model.to(target).eval().requires_grad_(False),
        tokenizer=None,
        device=target,
        dtype=kind,
    )


def _config(rest: str) -> dict[str, Any]:
    name = rest.removesuffix("-Instruct")
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    path = Path(rest).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return _llm.read_config(path, f"random:{rest}")
    raise BadInput(
        Fault(
            "subjects",
            "random:",
            "a known architecture or the path of a config.json",
            rest,
            near_matches(rest, ARCHITECTURES),
        )
    )
