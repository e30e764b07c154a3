import json
import os
import secrets
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from repro import submission
from repro.errors import BadInput, MachineFault
from repro.store import RunStore
from tests.repro.job_logs import ITEMS, RECORD, harmed, lines_of_cell, write_cell

pytestmark = pytest.mark.xdist_group("cluster")


def test_an_address_where_nobody_answers(plugins, write_manifest):
    pytest.importorskip("ray")
    with pytest.raises(BadInput, match="--address must be the URL of a Ray job server"):
        submission.submit(
            write_manifest(), address="http://127.0.0.1:9", profile="p", say=lambda line: None
        )


class BrokenTunnel:
    """A job client whose log breaks off: after so many lines, and in such a way, each time.

    A break without an error ends the log as if it were whole, in the middle of a line.
    """

    def __init__(self, log, breaks=(), *, status="SUCCEEDED"):
        from ray.job_submission import JobStatus

        self.log, self.breaks = log, list(breaks)
        self.status, self.running = JobStatus(status), JobStatus.RUNNING
        self.readings = 0

    async def tail_job_logs(self, job):
        self.readings += 1
        self.broken = bool(self.breaks)
        after, error = self.breaks.pop(0) if self.breaks else (len(self.log), None)
        for line in self.log[:after]:
            yield line
        if error is not None:
            raise error
        if self.broken:
            yield self.log[after].rstrip("\n")[:20]

    def get_job_info(self, job):
        status = self.running if self.broken else self.status
        return SimpleNamespace(status=status, message="")

    def get_job_status(self, job):
        return self.running


@pytest.fixture
def quick(monkeypatch):
    """Ray is installed, and a broken connection is tried again soon."""
    pytest.importorskip("ray")
    monkeypatch.setattr(submission, "RECONNECT_SECONDS", 0.2)


END = "@repro end"


def connection_errors():
    aiohttp = pytest.importorskip("aiohttp")
    info = SimpleNamespace(real_url="http://head:8265")
    return {
        "closed": RuntimeError("WebSocket connection closed abnormally"),
        "refused": aiohttp.WSServerHandshakeError(info, (), message="Invalid response status"),
        "disconnected": aiohttp.ServerDisconnectedError(),
        "unreachable": OSError("No route to host"),
        "the head lost the job's machine": None,
    }


@pytest.mark.parametrize("error", connection_errors())
def test_a_broken_connection_is_taken_up_again(tmp_path, quick, error):
    write_cell(tmp_path / "job", message=secrets.token_hex(50_000))
    files = [line for file in lines_of_cell(tmp_path / "job") for line in file]
    assert len(files) > 5
    log = ["[1/3] dense: ok", files[0], "[2/3] method: ok", *files[1:], "[3/3] other: ok", END]
    # Farther, less far than before, at once, and in the middle of a file.
    breaks = [(after, connection_errors()[error]) for after in (3, 1, 0, 5)]
    client, said = BrokenTunnel([line + "\n" for line in log], breaks), []
    store = RunStore(tmp_path / "here")
    ended, missing = submission._follow(client, "job", store, said.append)
    assert (ended.status, missing, client.readings) == ("SUCCEEDED", [], 5)
    assert said == ["[1/3] dense: ok", "[2/3] method: ok", "[3/3] other: ok"]
    for name in (RECORD, ITEMS):
        assert (store.root / name).read_bytes() == (tmp_path / "job" / name).read_bytes()


@pytest.mark.parametrize("error", connection_errors())
def test_a_connection_that_stays_broken_says_how_to_go_on(tmp_path, quick, error):
    client = BrokenTunnel(["a\n", "b\n"], [(1, connection_errors()[error])] * 100)
    said, began = [], time.monotonic()
    with pytest.raises(MachineFault, match="go on with --attach job"):
        submission._follow(client, "job", RunStore(tmp_path), said.append)
    assert said == ["a"] and client.readings == submission.RECONNECTS + 1
    assert time.monotonic() - began > 0.9 * submission.RECONNECT_SECONDS


def test_a_server_that_is_gone_says_how_to_go_on(tmp_path, quick, monkeypatch):
    client = BrokenTunnel(["a\n", "b\n"], [(1, OSError("no route"))])
    monkeypatch.setattr(submission, "_answers", lambda *_: False)
    with pytest.raises(MachineFault, match="no route; go on with --attach job"):
        submission._follow(client, "job", RunStore(tmp_path), print)
    assert client.readings == 1


def test_a_store_that_cannot_be_written_is_no_broken_connection(tmp_path, quick):
    write_cell(tmp_path / "job")
    files = [line for file in lines_of_cell(tmp_path / "job") for line in file]
    client = BrokenTunnel([line + "\n" for line in files])
    (tmp_path / "here").write_text("no folder")
    with pytest.raises(MachineFault, match=r"record\.json: cannot be"):
        submission._follow(client, "job", RunStore(tmp_path / "here"), print)
    assert client.readings == 1


@pytest.mark.parametrize(
    ("status", "harm", "good", "told"),
    [
        ("SUCCEEDED", None, True, ""),
        ("SUCCEEDED", "cut", False, "--attach job --address http://head:8265` reads the log again"),
        ("SUCCEEDED", "end", False, "missing here: the end of the log; `repro submit --attach"),
        ("FAILED", None, False, "job job: failed; see its log"),
        ("FAILED", "end", False, "job job: failed; see its log"),
    ],
)
def test_a_job_is_good_when_all_is_here(tmp_path, quick, monkeypatch, status, harm, good, told):
    write_cell(tmp_path / "job", items=5000)
    items, record = lines_of_cell(tmp_path / "job")
    log = [*(harmed(items, harm) if harm == "cut" else items), *record]
    log += [END] if harm != "end" else []
    client, said = BrokenTunnel([line + "\n" for line in log], status=status), []
    monkeypatch.setattr(submission, "_client", lambda address: client)
    follow = lambda: submission.follow(
        "job", address="http://head:8265", runs=tmp_path / "here", say=said.append
    )
    assert follow() == good
    assert (told in said[-1] if told else said == []) and len(said) <= 1
    assert (ITEMS in "".join(said)) == (harm == "cut")
    assert follow() == good  # what is here already does no harm


@pytest.mark.skipif(os.name != "posix", reason="a pipe that nobody reads ends otherwise there")
@pytest.mark.parametrize("options", [["--attach", "job"], ["toy.yaml", "--no-follow"]])
@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_a_reader_that_leaves_is_no_failure(tmp_path, options, good, code):
    script = (
        "from repro import cli, submission\n"
        f"submission.follow = lambda *_, **__: {good}\n"
        "submission.submit = lambda *_, **__: 'job'\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", script, "submit", *options, "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [*command, "--results", str(tmp_path / "results")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b"job job\n"
    assert process.wait(timeout=60) == (code if "--attach" in options else 0)


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
