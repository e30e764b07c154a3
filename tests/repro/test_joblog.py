import secrets
import socket
import sys
from types import SimpleNamespace

import pytest

from repro.joblog import Inbox, Outbox, lines_of
from repro.store import RunStore
from tests.repro.job_logs import (
    CLUSTER,
    HARMS,
    ITEMS,
    KEY,
    RECORD,
    cell_of,
    harmed,
    lines_of_cell,
    take_all,
    write_cell,
)


def test_a_file_travels_in_short_lines(tmp_path):
    write_cell(tmp_path / "job", message=secrets.token_hex(50_000))
    (lines,) = lines_of_cell(tmp_path / "job", ("record.json",))
    assert len(lines) > 5 and max(map(len, lines)) < 20_000
    assert take_all(tmp_path / "here", lines) == []
    sent, here = (tmp_path / place / RECORD for place in ("job", "here"))
    assert here.read_bytes() == sent.read_bytes()


def test_other_lines_are_shown(tmp_path):
    inbox = Inbox(RunStore(tmp_path))
    for line in ("[1/2] dense: ok", "", "see @repro for more"):
        assert inbox.take(line) == line
    assert inbox.missing() == []


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_record_is_left_out_and_told(tmp_path, harm):
    write_cell(tmp_path / "job", message=secrets.token_hex(50_000))
    items, record = lines_of_cell(tmp_path / "job")
    assert take_all(tmp_path / "here", items, harmed(record, harm)) == [RECORD]
    assert [path for path in (tmp_path / "here").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_items_are_told_and_arrive_with_the_next_reading(tmp_path, harm):
    write_cell(tmp_path / "job", items=5000)
    items, record = lines_of_cell(tmp_path / "job")
    assert len(items) > 2
    assert take_all(tmp_path / "here", harmed(items, harm), record) == [ITEMS]
    assert cell_of(tmp_path / "here").read_record()["status"] == "ok"
    assert not (tmp_path / "here" / ITEMS).exists()
    assert take_all(tmp_path / "here", items, record) == []
    assert (tmp_path / "here" / ITEMS).read_bytes() == (tmp_path / "job" / ITEMS).read_bytes()


def test_a_record_that_never_comes_is_told(tmp_path):
    write_cell(tmp_path / "job")
    items, _ = lines_of_cell(tmp_path / "job")
    assert take_all(tmp_path / "here", items) == [RECORD]


def test_a_record_of_one_line_that_is_cut_is_told(tmp_path):
    write_cell(tmp_path / "job")
    ((line,),) = lines_of_cell(tmp_path / "job", ("record.json",))
    inbox = Inbox(RunStore(tmp_path / "here"))
    assert inbox.take(line[:-40] + "(another writer)") is None
    assert inbox.missing() == [RECORD]


def test_a_file_survives_text_before_its_lines(tmp_path):
    write_cell(tmp_path / "job")
    inbox = Inbox(RunStore(tmp_path / "here"))
    for lines in lines_of_cell(tmp_path / "job"):
        assert [inbox.take("50 % done" + line) for line in lines] == ["50 % done"] * len(lines)
    assert inbox.missing() == []
    assert cell_of(tmp_path / "here").read_record()["status"] == "ok"


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        f"cells/ab/{KEY}/../../../x",
        f"cells/ab/{KEY}/../record.json",
        "a/b/cpu.py",
        "x/y/../z.json",
        "../../cpu.json",
        "../manifests/cuda.json",
        "name/../cpu.json",
        "./name/cpu.json",
        ".hidden/p/cpu.json",
        "link/p/cpu.json",
    ],
)
def test_a_log_writes_nowhere_else(tmp_path, name):
    store = RunStore(tmp_path / "place" / "runs")
    store.root.mkdir(parents=True)
    (store.root / "link").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    inbox = Inbox(store)
    for line in lines_of(name, b"harm"):
        inbox.take(line)
    assert sorted(tmp_path.rglob("*")) == before
    assert inbox.missing() == [name]


# What is here, what arrives, whether it is taken; each as status and day.
ARRIVALS = {
    "a result after a crash": (("crashed", 1), ("ok", 2), True),
    "an older crash after a result": (("ok", 2), ("crashed", 1), False),
    "a newer crash after a result": (("oom", 1), ("crashed", 2), False),
    "an older crash after a crash": (("crashed", 2), ("infra", 1), False),
    "a newer crash after a crash": (("crashed", 1), ("infra", 2), True),
    "another result after a result": (("ok", 1), ("timeout", 2), False),
}


@pytest.mark.parametrize("case", ARRIVALS)
def test_what_is_here_and_better_stays(tmp_path, case):
    (status, day), (new_status, new_day), taken = ARRIVALS[case]
    write_cell(tmp_path / "job", new_status, day=new_day, items=4)
    write_cell(tmp_path / "here", status, day=day, items=2)
    expected = (tmp_path / ("job" if taken else "here") / ITEMS).read_bytes()
    assert take_all(tmp_path / "here", *lines_of_cell(tmp_path / "job")) == []
    assert cell_of(tmp_path / "here").read_record()["status"] == (new_status if taken else status)
    assert (tmp_path / "here" / ITEMS).read_bytes() == expected


def test_fewer_items_replace_none(tmp_path):
    write_cell(tmp_path / "job", "infra", day=2, items=2)
    write_cell(tmp_path / "here", "crashed", day=1, items=5)
    kept = (tmp_path / "here" / ITEMS).read_bytes()
    assert take_all(tmp_path / "here", *lines_of_cell(tmp_path / "job")) == []
    assert cell_of(tmp_path / "here").read_record()["status"] == "infra"
    assert (tmp_path / "here" / ITEMS).read_bytes() == kept


def sent(tmp_path, record, **how):
    """Return the names of the files that a job with a store at ``job`` sends for a record."""
    log = tmp_path / "log"
    with log.open("ab") as stream:
        outbox = Outbox(RunStore(tmp_path / "job"), "name", "p", stream.fileno())
        outbox.finished(SimpleNamespace(key=KEY), record, **{"cached": False, **how})
    return [line.split()[1] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("status", ["ok", "not_run"])
def test_a_job_sends_the_folder_of_the_machine_that_ran(tmp_path, status):
    laptop = {**CLUSTER, "environment_id": "a-laptop"}
    write_cell(tmp_path / "job", "crashed", environment=laptop)
    record = write_cell(tmp_path / "job", status)
    assert sent(tmp_path, record) == [ITEMS, RECORD]


def test_a_job_says_when_everything_is_sent(tmp_path):
    with (tmp_path / "log").open("wb") as stream:
        Outbox(RunStore(tmp_path), "name", "p", stream.fileno()).close()
    inbox = Inbox(RunStore(tmp_path))
    assert inbox.take("all is well") == "all is well" and not inbox.ended
    assert inbox.take("cut short: " + (tmp_path / "log").read_text().strip()) == "cut short: "
    assert inbox.ended and inbox.missing() == []


@pytest.mark.parametrize(
    ("here", "comes", "taken"),
    [("1", "2", True), ("2", "1", False), ("1", "1", True), (None, "1", True), ("", "1", True)],
)
def test_an_older_index_replaces_none(tmp_path, here, comes, taken):
    """That of an old job, attached again."""
    place = tmp_path / "name" / "p" / "cpu.json"
    before = b"" if here is None else b'{"created": "%s", "old": 1}' % here.encode()
    if here is not None:
        place.parent.mkdir(parents=True)
        place.write_bytes(before)
    data = b'{"created": "%s"}' % comes.encode()
    assert take_all(tmp_path, list(lines_of("name/p/cpu.json", data))) == []
    assert place.read_bytes() == (data if taken else before)


def test_a_job_sends_no_record_that_was_shipped(tmp_path):
    assert sent(tmp_path, write_cell(tmp_path / "job"), cached=True) == []


@pytest.mark.skipif(sys.platform != "linux", reason="sockets that keep writes apart")
def test_every_line_is_written_at_once(tmp_path):
    record = write_cell(tmp_path / "job", message=secrets.token_hex(20_000))
    log, reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with log, reader:
        outbox = Outbox(RunStore(tmp_path / "job"), "name", "p", log.fileno())
        outbox.finished(SimpleNamespace(key=KEY), record, cached=False)
        log.shutdown(socket.SHUT_WR)
        writes = []
        while data := reader.recv(100_000):
            writes.append(data)
    assert len(writes) > 3
    assert all(w.startswith(b"@repro ") and w.endswith(b"\n") for w in writes)
    assert take_all(tmp_path / "here", [w.decode().rstrip("\n") for w in writes]) == []
