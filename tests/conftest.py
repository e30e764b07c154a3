"""Shared fixtures. Triton kernels run under the interpreter on the CPU."""

import os
import signal

# Started in the background of a shell, tests ignore Ctrl-C, and so would all they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before any kernel module is imported: the switch is read when a kernel is decorated.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run in several processes: a thread that spins while it waits takes a core from another.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest


@pytest.fixture
def nan_filled_empty():
    """Make ``torch.empty`` return NaN (integers: maximum), which exposes unwritten outputs."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
