"""The driver's part of the Ray executor against a cluster that is played: any failure at will."""

import time
from types import SimpleNamespace

import pytest

from repro.budget import Allowance, Budget
from repro.errors import MachineFault
from repro.executors import Session, _pool, _worker
from repro.executors._pool import Pool, Request
from repro.plan import Plan, PlannedCell
from repro.progress import Quiet
from repro.store import RunStore, environment_key, make_record

ray = pytest.importorskip("ray")
HERE = {"environment_id": "here"}


def node(name, **resources):
    has = {"CPU": 2.0, **resources}
    return {"NodeID": node_id(name), "name": name, "Alive": True, "Resources": has}


def node_id(name):
    return name.encode().hex().ljust(56, "0")


def cells(count, *, name="noop", length=None, subject="s"):
    found = []
    for index in range(count):
        options = {"task": f"t{index}"} | ({"length": length(index)} if length else {})
        if length:
            options["task"] = "t"
        cell = {"subject": subject, "method": {"slug": "dense", "config": {}}, "device": "cpu"}
        cell |= {"measurement": {"name": name, "options": options}, "seed": 0}
        cell["label"] = f"{subject}{index}"
        key = f"{subject}{index}".ljust(64, "0")
        found.append(PlannedCell(key=key, cell=cell, estimate_seconds=1.0))
    return found


def measured(planned, environment, **body):
    key, cell = planned["key"], planned["cell"]
    return make_record(key, cell, "ok", environment=environment, created="now", seconds=1, **body)


class Actor:
    """Answers every call at once, as the cluster's script says."""

    def __init__(self, cluster, options, name):
        self.cluster, self.options, self.name = cluster, options, name
        strategy = options.get("scheduling_strategy")
        pinned = [n["name"] for n in cluster.alive if strategy and n["NodeID"] == strategy.node_id]
        self.node = (pinned or [cluster.alive[0]["name"]])[0]
        self.environment = cluster.environments.get(self.node, HERE)
        self.shared = self.node not in cluster.elsewhere
        for method in ("ready", "run", "progress", "close"):
            setattr(self, method, SimpleNamespace(remote=getattr(self, f"_{method}")))

    def _ready(self, device):
        self.cluster.starts.append(self.node)
        if self.node in self.cluster.unstartable:
            return [ray.exceptions.RayActorError(error_msg="no")]
        found = {"environment": self.environment, "healthy": self.node not in self.cluster.broken}
        return [
            found | {"shared": self.shared, "worker": self.name, "node": node_id(self.node)} | WARN
        ]

    def _run(self, planned, items):
        self.cluster.runs.append((planned["key"][:2], self.node))
        answer = self.cluster.script(self, planned)
        if isinstance(answer, (Exception, Never)):
            return [answer]
        if not self.shared:
            answer = {"items": b"", "log": "", "output": ""} | answer
        return [{"healthy": True} | WARN | answer]

    def _progress(self, key, offset):
        return [(0, 1, b"")]

    def _close(self):
        self.cluster.closed.append(self.name)
        return [None]


class Never:
    """What a call answers that never ends."""


WARN = {"warnings": []}


class Cluster:
    exceptions = ray.exceptions
    util = SimpleNamespace(client=SimpleNamespace(ray=SimpleNamespace(is_connected=lambda: True)))

    def __init__(self, *nodes):
        self.alive = list(nodes)
        self.environments = {}
        self.elsewhere, self.broken, self.unstartable = set(), set(), set()
        self.starts, self.runs, self.killed, self.closed, self.options_seen = [], [], [], [], []
        self.script = lambda actor, planned: {"record": measured(planned, actor.environment)}

    def nodes(self):
        return self.alive

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="127.0.0.1:1")

    def wait(self, calls, num_returns=1, timeout=None):
        done = [call for call in calls if not isinstance(call[0], Never)]
        if not done:
            time.sleep(0.01)
        return done, [call for call in calls if call not in done]

    def get(self, call):
        if isinstance(call[0], Exception):
            raise call[0]
        return call[0]

    def kill(self, actor, no_restart):
        self.killed.append((actor.node, no_restart))

    def options(self, **options):
        self.options_seen.append(options)
        return SimpleNamespace(remote=lambda *a: Actor(self, options, a[3]))


class Calls(list):
    """A call that can be the key of a dict."""

    __hash__ = object.__hash__


@pytest.fixture
def drain(tmp_path, monkeypatch):
    monkeypatch.setattr(_pool, "GROW_SECONDS", 0.0)
    for module in (_pool, _worker):
        monkeypatch.setattr(module, "BACK_OFF_SECONDS", 0.0)
    for method in ("_ready", "_run", "_progress", "_close"):
        real = getattr(Actor, method)
        wrapped = lambda self, *a, real=real: Calls(real(self, *a))
        monkeypatch.setattr(Actor, method, wrapped)

    def call(cluster, planned, *, request=None, plan=None, **options):
        plan = plan or {}
        made = Plan(name="n", profile="p", device="cpu", manifest={}, cells=tuple(planned), **plan)
        session = Session(made, planned, RunStore(tmp_path), HERE, Quiet(), **options)
        said = []
        session.listener.message = said.append
        request = request or Request(whole_node=True)
        Pool(cluster, session, request, session.pending(), actor_class=cluster).drain()
        assert set(session.records) == {cell.key for cell in planned}
        return session, said

    return call


def statuses(session):
    return [session.records[cell.key]["status"] for cell in session.selected]


def test_one_worker_a_node_takes_all_its_cpus(drain):
    cluster = Cluster(node("a", CPU=4.0), node("b", CPU=64.0), node("c", CPU=0.0))
    drain(cluster, cells(6))
    assert [options["num_cpus"] for options in cluster.options_seen] == [4.0, 64.0]
    assert sorted(cluster.starts) == ["a", "b"]


def test_workers_share_what_a_node_has():
    request = Request(gpus=0.25)
    assert request.room(node("a", CPU=64.0, GPU=2.0)) == 8
    assert request.room(node("a", CPU=3.0, GPU=2.0)) == 3
    assert Request(gpus=4.0).room(node("a", CPU=64.0, GPU=2.0)) == 0


def test_nothing_fits_now_so_one_waits_for_a_node(drain):
    cluster = Cluster(node("a"))
    drain(cluster, cells(2), request=Request(gpus=1.0))
    assert cluster.options_seen == [{"num_cpus": 1.0, "num_gpus": 1.0}]


def test_a_node_whose_device_is_lost_or_too_small_gets_no_cell(drain):
    cluster = Cluster(node("a"), node("b"), node("c"))
    cluster.broken = {"a"}
    cluster.environments = {
        "b": {"environment_id": "small", "memory_bytes": 39e9},
        "c": {"environment_id": "large", "memory_bytes": 80e9},
    }
    session, said = drain(cluster, cells(4), plan={"resources": {"memory_gib": 80}})
    assert {place for _, place in cluster.runs} == {"c"}
    assert statuses(session) == ["ok"] * 4
    assert any("its device does not compute" in text for text in said)
    assert any("asks for 80 GiB of memory, it has 36" in text for text in said)
    assert cluster.starts.count("a") == cluster.starts.count("b") == 1


def test_where_no_worker_can_be_the_cells_are_settled(drain):
    cluster = Cluster(node("a"))
    cluster.unstartable = {"a"}
    session, _ = drain(cluster, cells(3))
    assert statuses(session) == ["infra"] * 3
    assert len(cluster.starts) == _pool.READY_TRIES


def test_failures_that_a_success_parts_do_not_add_up(drain):
    cluster = Cluster(node("a"))

    def script(actor, planned):
        # The node goes bad for one start after every cell.
        if len(cluster.starts) < 12:
            cluster.unstartable = {"a"}
            cluster.alive[0] = node("a")
            return ray.exceptions.RayActorError(error_msg="died")
        return {"record": measured(planned, actor.environment)}

    real = Actor._ready

    def ready(self, device):
        answer = real(self, device)
        cluster.unstartable = set()
        return answer

    cluster.script = script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Actor, "_ready", ready)
        patch.setattr(_pool, "INFRA_TRIES", 99)
        session, _ = drain(cluster, cells(1))
    assert statuses(session) == ["ok"]


def test_a_full_disk_elsewhere_costs_that_node_alone(drain, tmp_path):
    cluster = Cluster(node("a"), node("b"))
    cluster.elsewhere = {"a", "b"}
    cluster.environments = {"a": {"environment_id": "a"}, "b": {"environment_id": "b"}}

    def script(actor, planned):
        if actor.node == "a":
            return {"record": None, "fault": "/tmp/x: cannot be written", "items": b"kept\n"}
        return {"record": measured(planned, actor.environment), "items": b"all\n"}

    cluster.script = script
    session, _ = drain(cluster, cells(3))
    assert statuses(session) == ["ok"] * 3
    assert [place for _, place in cluster.runs].count("a") == 1
    assert cluster.starts.count("a") == 1
    kept = RunStore(tmp_path).cell(cells(1)[0].key, environment_key({"environment_id": "a"}))
    assert kept.items_path.read_bytes() == b"kept\n"
    assert len(cluster.closed) == 2  # nobody leaves a folder behind


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_a_head_that_is_silent_for_long_is_told(monkeypatch, address):
    cluster = SimpleNamespace(
        get_runtime_context=lambda: SimpleNamespace(gcs_address=f"{address}:9"),
        util=SimpleNamespace(client=SimpleNamespace(ray=SimpleNamespace(is_connected=bool))),
    )
    head = _pool._Head(cluster)
    assert not head.answers()  # it may come back
    monkeypatch.setattr(_pool, "HEAD_SECONDS", 0.0)
    with pytest.raises(MachineFault, match="what is finished is kept. Start the cluster again"):
        head.answers()
    calls = []

    def connect(place, timeout):
        calls.append(place)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(_pool.socket, "create_connection", connect)
    assert head.answers() and head.answers()
    assert calls[0] == (address.strip("[]"), 9)


def test_a_fault_of_the_shared_store_ends_the_run(drain):
    cluster = Cluster(node("a"))
    cluster.script = lambda actor, planned: {"record": None, "fault": "disk full"}
    with pytest.raises(MachineFault, match="disk full"):
        drain(cluster, cells(2))


def test_a_worker_out_of_reach_is_ended_before_its_cell_runs_again(drain):
    cluster = Cluster(node("a"))
    lost = []

    def script(actor, planned):
        if not lost:
            lost.append(planned)
            return ray.exceptions.ActorUnavailableError("gone for a while", b"0" * 16)
        assert cluster.killed == [("a", False)]
        return {"record": measured(planned, actor.environment)}

    cluster.script = script
    session, said = drain(cluster, cells(1))
    assert statuses(session) == ["ok"] and len(cluster.runs) == 2
    assert any("trying again" in text for text in said)


def test_a_record_that_a_worker_left_before_it_died_is_the_outcome(drain, tmp_path):
    cluster = Cluster(node("a"))

    def script(actor, planned):
        record = measured(planned, HERE, metrics={"score": {"value": 1.0}})
        RunStore(tmp_path).cell(planned["key"], environment_key(HERE)).write_record(record)
        return ray.exceptions.RayActorError(error_msg="died")

    cluster.script = script
    session, _ = drain(cluster, cells(2), keep_going=False)
    assert statuses(session) == ["ok"] * 2 and len(cluster.runs) == 2
    assert session.listener.counts == {"ok": 2}


def test_a_segmentation_fault_is_found_on_the_machine_where_it_was(drain, tmp_path):
    cluster = Cluster(node("a"))
    there = cluster.environments["a"] = {"environment_id": "there"}

    def script(actor, planned):
        folder = RunStore(tmp_path).cell(planned["key"], environment_key(there))
        folder.path.mkdir(parents=True)
        folder.fatal_path.write_text("Fatal Python error: Segmentation fault\n\nstack")
        return ray.exceptions.RayActorError(error_msg="died")

    cluster.script = script
    session, _ = drain(cluster, cells(1))
    assert statuses(session) == ["crashed"] and len(cluster.runs) == 1


def test_fresh_never_takes_an_old_record_of_a_second_machine(drain, tmp_path):
    cluster = Cluster(node("a"), node("b"))
    cluster.environments = {"a": {"environment_id": "a"}, "b": {"environment_id": "b"}}
    planned = cells(1)
    for environment in cluster.environments.values():
        old = measured(planned[0].to_json(), environment, old=True)
        RunStore(tmp_path).cell(planned[0].key, environment_key(environment)).write_record(old)
    died = []

    def script(actor, planned):
        if not died:
            died.append(actor.node)
            cluster.alive = [entry for entry in cluster.alive if entry["name"] != actor.node]
            return ray.exceptions.RayActorError(error_msg="died")
        return {"record": measured(planned, actor.environment)}

    cluster.script = script
    cluster.unstartable = died  # the second start there fails
    session, _ = drain(cluster, planned, fresh=True)
    assert "old" not in session.records[planned[0].key]


def test_what_runs_out_on_a_small_machine_is_tried_on_a_large_one(drain):
    cluster = Cluster(node("small"), node("large"))
    cluster.environments = {"small": {"environment_id": "s"}, "large": {"environment_id": "l"}}

    def script(actor, planned):
        record = measured(planned, actor.environment)
        if actor.node == "small":
            record["status"] = "oom"
        return {"record": record}

    cluster.script = script
    session, _ = drain(cluster, cells(3, length=lambda i: 128 * (i + 1)))
    found = {
        (record["environment"]["environment_id"], record["status"])
        for record in session.records.values()
    }
    # Either machine may get the first one; none of the large one is ever implied.
    assert ("l", "implied") not in found and ("l", "oom") not in found


def test_a_cell_that_never_ends_is_charged_with_its_time(drain):
    cluster = Cluster(node("a"))
    cluster.script = lambda actor, planned: Never()
    allowance = Allowance(Budget(3600))
    session, _ = drain(cluster, cells(1), plan={"timeout_seconds": 0.05}, allowance=allowance)
    assert statuses(session) == ["timeout"]
    assert cluster.killed[0] == ("a", False)
    assert 0.05 <= allowance._spent < 5 and allowance._reserved == {}
    assert session.records[cells(1)[0].key]["seconds"] >= 0.05
