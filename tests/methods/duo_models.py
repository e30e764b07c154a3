"""What the tests of DuoAttention share: a small model, configurations, gates."""

import torch

from repro.method import Artifact
from repro.methods.duoattention import TRAINING, DuoAttentionConfig
from repro.testing import byte_tokenizer, tiny_subject

TIGHT = DuoAttentionConfig(control="random", sink_size=3, recent_size=5, chunk_size=12)
WINDOW = TIGHT.sink_size + TIGHT.recent_size
QUICK = DuoAttentionConfig(
    steps=3, shortest=512, longest=1024, lengths=2, passkeys=2, learning_rate=0.1
)
GATES = torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.4, 0.3]])


def make_subject():
    """A random model of three layers whose attention is peaked, with biases as the retriever's."""
    made = tiny_subject(layers=3, heads=4, kv_heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in made.model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight *= 12
            attention.k_proj.weight *= 12
            for name in "qkvo":
                part = getattr(attention, f"{name}_proj")
                bias = torch.randn(part.out_features, generator=generator)
                part.bias = torch.nn.Parameter(0.1 * bias)
    made.tokenizer = byte_tokenizer()
    return made


@torch.no_grad()
def logits(subject, ids, **options):
    return subject.model(ids, **options).logits


def artifact_of(gates, config=None):
    metadata = {name: getattr(config or DuoAttentionConfig(), name) for name in TRAINING}
    return Artifact(tensors={"gates": gates}, metadata=metadata)
