import json
import os
import signal
import subprocess
import sys

import pytest

from repro import submission
from repro.errors import BadInput, MachineFault
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


class BrokenTunnel:
    """A job client whose log breaks off once, or for good."""

    def __init__(self, log, *, breaks, status="SUCCEEDED"):
        from ray.job_submission import JobStatus

        self.log, self.breaks, self.status = log, breaks, JobStatus(status)

    async def tail_job_logs(self, job):
        for number, line in enumerate(self.log):
            if self.breaks and number == len(self.log) // 2:
                self.breaks -= 1
                raise RuntimeError("WebSocket connection closed abnormally")
            yield line

    def get_job_status(self, job):
        return self.status if not self.breaks else type(self.status).RUNNING


def test_a_broken_connection_is_taken_up_again(tmp_path):
    pytest.importorskip("ray")
    data = os.urandom(30_000)
    lines = ["[1/2] dense: ok", *submission.lines_of(RECORD, data), "[2/2] method: ok"]
    client = BrokenTunnel([line + "\n" for line in lines], breaks=1)
    said = []
    status = submission._follow(client, "job", submission.Inbox(RunStore(tmp_path)), said.append)
    assert status == "SUCCEEDED" and said == ["[1/2] dense: ok", "[2/2] method: ok"]
    assert (tmp_path / RECORD).read_bytes() == data


def test_a_connection_that_stays_broken_says_how_to_go_on(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(submission, "RECONNECT_SECONDS", 0.0)
    client = BrokenTunnel(["a\n", "b\n"], breaks=1)
    with pytest.raises(MachineFault, match="go on with --attach job"):
        submission._follow(client, "job", submission.Inbox(RunStore(tmp_path)), print)


@pytest.mark.skipif(os.name != "posix", reason="processes are ended by signal")
def test_submit_follow_detach_and_submit_again(plugins, write_manifest, tmp_path):
    pytest.importorskip("ray")
    from tests.repro.ray_cluster import Cluster, wait_for

    path = write_manifest(
        measurements="[{noop: {lengths: [128, 256, 512], items: 8, pause: 0.2}}]",
        methods="[dense]",
    )
    stored = tmp_path / "stored"
    cluster = Cluster(1, {**plugins.environment, "TOY_STORED": str(stored)}, job_server=True)
    runs = tmp_path / "runs"

    def submit(*arguments):
        command = [sys.executable, "-m", "repro", "submit", "--address", cluster.job_server]
        command += ["--runs", str(runs), "--results", str(tmp_path / "results"), *arguments]
        return subprocess.Popen(
            command, env=cluster.environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    records = lambda: list(runs.rglob("record.json"))
    try:
        first = submit(str(path), "--profile", "p", "--device", "cpu")
        wait_for(lambda: len(records()) >= 1 or first.poll() is not None, first)
        assert first.poll() is None, first.communicate()[1]
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 130
        (line,) = [line for line in errors.splitlines() if line.startswith("detached")]
        job = line.split("--attach ")[1].split()[0]
        again = submit("--attach", job)
        _, errors = again.communicate(timeout=120)
        assert again.returncode == 0, errors
        assert len(records()) == 3
        assert all(json.loads(p.read_bytes())["status"] == "ok" for p in records())
        computed = stored.read_text()
        once_more = submit(str(path), "--profile", "p", "--device", "cpu")
        _, errors = once_more.communicate(timeout=120)
        assert once_more.returncode == 0, errors
        assert "sending the checkout and 3 records" in errors
        assert stored.read_text() == computed
    finally:
        cluster.stop()
