"""The constant-size store of first and latest tokens, against a list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.kv_cache import LayerShape
from repro.kv_window import SinkWindow, visible_slots

SHAPE = LayerShape(0, 2, 1, 1, 4, torch.float32, torch.device("cpu"))


def token(position):
    return torch.full((1, 1, 1, 4), float(position))


def run_of(begin, count):
    return torch.cat([token(p) for p in range(begin, begin + count)] or [token(0)[:, :, :0]], 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sink=st.integers(0, 5),
    recent=st.integers(1, 7),
    passes=st.lists(st.integers(0, 12), min_size=1, max_size=6),
)
def test_holds_the_first_and_the_last(sink, recent, passes):
    window = SinkWindow(SHAPE, sink_size=sink, recent_size=recent)
    seen = 0
    for count in passes:
        new = run_of(seen, count)
        window.append(1, new, -new)
        seen += count
        kept = [p for p in range(seen) if p < sink or p >= seen - recent]
        k, v = window.ordered(1)
        assert window.positions(1).tolist() == kept and window.held(1) == len(kept)
        assert k[0, 0, :, 0].tolist() == kept and torch.equal(v, -k)
        assert window.ordered(0)[0].shape[2] == 0


@pytest.mark.parametrize("lengths", [(0, 3), (2, 30), (30, 31)])
def test_one_token_each_goes_where_a_run_goes(lengths):
    each, runs = (SinkWindow(SHAPE, sink_size=2, recent_size=4) for _ in range(2))
    for row, length in enumerate(lengths):
        for window in (each, runs):
            window.append(row, run_of(0, length), run_of(0, length))
        runs.append(row, token(length), token(length))
    new = torch.cat([token(length) for length in lengths])
    each.append_each(new, new)
    assert each.lengths == runs.lengths
    assert torch.equal(each.k, runs.k) and torch.equal(each.v, runs.v)
    visible = visible_slots(each)
    for row in range(2):
        slots = [float(x) for x in each.k[row, 0, :, 0]]
        shown = (
            slots
            if visible is None
            else [x for x, s in zip(slots, visible[row, 0, 0], strict=True) if s]
        )
        assert sorted(shown) == each.positions(row).tolist()
    assert (visible is None) == (min(each.lengths) >= 6)
