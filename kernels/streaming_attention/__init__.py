"""Streaming attention: every query sees the first tokens and the latest ones."""

from repro.kernels.streaming_attention.api import streaming_attention
from repro.kernels.streaming_attention.reference import streaming_attention_reference

__all__ = ["streaming_attention", "streaming_attention_reference"]
