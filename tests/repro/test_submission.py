import os

import pytest

from repro import submission
from repro.errors import BadInput
from repro.store import RunStore

KEY = "ab" + "0" * 62
RECORD = f"cells/ab/{KEY}/cpu-1/record.json"


def test_a_file_travels_in_short_lines(tmp_path):
    data = os.urandom(50_000)
    lines = list(submission.lines_of(RECORD, data))
    assert len(lines) > 5 and max(map(len, lines)) < 20_000
    inbox = submission.Inbox(RunStore(tmp_path))
    assert all(inbox.take(line) for line in lines)
    assert (tmp_path / RECORD).read_bytes() == data
    assert not inbox.take("[1/2] dense: ok")


@pytest.mark.parametrize("harm", ["a part is missing", "a letter is changed", "cut"])
def test_a_damaged_file_is_left_out(tmp_path, harm):
    lines = list(submission.lines_of(RECORD, os.urandom(50_000)))
    if harm == "a part is missing":
        del lines[2]
    elif harm == "cut":
        lines[2] = lines[2][:-5]
    else:
        lines[2] = lines[2][:-5] + ("A" if lines[2][-5] != "A" else "B") + lines[2][-4:]
    inbox = submission.Inbox(RunStore(tmp_path))
    for line in lines:
        inbox.take(line)
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", f"cells/ab/{KEY}/../../../x", "a/b/cpu.py", "x/y/../z.json"]
)
def test_a_log_writes_nowhere_else(tmp_path, name):
    store = RunStore(tmp_path / "runs")
    for line in submission.lines_of(name, b"harm"):
        submission.Inbox(store).take(line)
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nobody_answers(plugins, write_manifest):
    pytest.importorskip("ray")
    with pytest.raises(BadInput, match="--address must be the URL of a Ray job server"):
        submission.submit(
            write_manifest(), address="http://127.0.0.1:9", profile="p", say=lambda line: None
        )
