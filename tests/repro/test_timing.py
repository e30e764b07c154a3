"""The statistics of timing on synthetic block times: what is true is known there."""

import math

import numpy as np
import pytest

from repro import timing, timing_statistics
from repro.timing import Arm, Blocks, Settings


class SyntheticTimer:
    """A call returns how many seconds it "took"; the order of the calls is kept."""

    device_type = "cpu"
    regime = "synthetic"

    def run(self, call, inputs):
        outputs = [call(value) for value in inputs]
        return sum(outputs), outputs[-1]


def noise(rng, n, *, spread=0.05, correlation=0.0):
    """Log-normal noise factors [n], first-order autocorrelated."""
    draws = rng.standard_normal(n)
    values = np.empty(n)
    values[0] = draws[0]
    for i in range(1, n):
        values[i] = correlation * values[i - 1] + math.sqrt(1 - correlation**2) * draws[i]
    return np.exp(spread * values)


def run_of(first, second, **changes):
    """A finished run of two arms from their block times [n_blocks], in seconds."""
    seconds = np.stack([np.asarray(first, float), np.asarray(second, float)], axis=1)
    values = {
        "names": ["dense", "method"],
        "seconds": seconds,
        "device_seconds": np.full(len(seconds), 1.0),
        "order": "palindrome",
        "repeats": [1, 1],
        "faults": {},
        "states": [],
        "warmup": timing_statistics.warmup_blocks(seconds) or 0,
        "regime": "synthetic",
    }
    return Blocks(**(values | changes))


def summarise(first, second, **changes):
    return timing.summarise([run_of(first, second, **changes)], "method", Settings())


def test_known_ratio_lies_in_its_interval_about_95_times_in_100():
    rng, hits, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        machine = noise(rng, 12, spread=0.3, correlation=0.8)
        dense, method = 2.0 * machine * noise(rng, 12), machine * noise(rng, 12)
        found = timing_statistics.ratio_interval(dense, method, resamples=1000, seed=trial)
        hits += found.low <= 2.0 <= found.high
        assert found.low <= found.value <= found.high
    # Three standard errors below 95 %; above is allowed, the interval widens on doubt.
    assert hits / trials >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


def test_interval_shrinks_with_blocks_and_is_seeded():
    rng = np.random.default_rng(1)
    few, many = (timing_statistics.ratio_interval(noise(rng, n), np.ones(n)) for n in (10, 160))
    assert many.high / many.low - 1 < (few.high / few.low - 1) / 2
    times = noise(rng, 10)
    again = [timing_statistics.ratio_interval(times, np.ones(10)) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("n_blocks", [12, 30])
def test_layers_that_differ_count_by_their_time(n_blocks):
    """One layer of three gains: what counts is the time of all three, not the middle one."""
    rng, hits, trials = np.random.default_rng(2), 0, 300
    strata = np.arange(n_blocks) % 3
    base, gain = np.array([1.0, 2.0, 2.0])[strata], np.array([2.0, 0.8, 0.8])[strata]
    truth = 5.0 / (1 / 2.0 + 2 / 0.8 + 2 / 0.8)
    for trial in range(trials):
        machine = noise(rng, n_blocks, spread=0.2, correlation=0.8)
        dense = base * machine * noise(rng, n_blocks)
        method = base / gain * machine * noise(rng, n_blocks)
        found = timing_statistics.ratio_interval(dense, method, strata, resamples=1000, seed=trial)
        hits += found.low <= truth <= found.high
    assert hits / trials >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)
    assert found.high / found.low < 1.4  # noise, and not the spread of the layers
    alike = timing_statistics.ratio_interval(dense, method)
    assert alike.value < 0.95 * truth  # the middle layer outvotes the others


def test_strata_are_levelled_arm_by_arm():
    strata = np.arange(12) % 3
    drift = np.linspace(1.0, 1.1, 12)
    times = np.stack([np.array([1.0, 5.0, 9.0])[strata] * drift, drift], axis=1)
    level = timing_statistics.levelled(times, strata)
    assert np.allclose(level[:, 0] / level[:, 1], (1 * 5 * 9) ** (1 / 3), rtol=1e-6)
    assert np.allclose(timing_statistics.levelled(drift, np.zeros(12)), drift)


def test_interval_of_one_block_says_nothing():
    found = timing_statistics.ratio_interval(np.array([2.0]), np.ones(1))
    assert (found.low, found.high) == (0.0, math.inf)


@pytest.mark.parametrize(("correlation", "allowed"), [(0.0, 0.03), (0.3, 0.08), (0.6, 0.15)])
def test_ordinary_noise_is_not_called_drift(correlation, allowed):
    rng, stamped, trials = np.random.default_rng(2), 0, 100
    for _ in range(trials):
        machine = noise(rng, 14, spread=0.15, correlation=correlation)
        own = [noise(rng, 14, spread=0.04, correlation=correlation) for _ in range(2)]
        stamped += not summarise(machine * own[0], 0.5 * machine * own[1]).valid
    assert stamped / trials <= allowed


@pytest.mark.parametrize("kind", ["ratio", "jump", "baseline"])
def test_drift_is_stamped_invalid(kind):
    rng, stamped, trials = np.random.default_rng(3), 0, 60
    ramp = np.linspace(1.0, 2.0, 16)
    for _ in range(trials):
        dense, method = noise(rng, 16, spread=0.03), noise(rng, 16, spread=0.03)
        if kind == "ratio":
            method = method * ramp
        elif kind == "jump":
            method = method * np.where(np.arange(16) < 8, 1.0, 1.4)
        else:
            dense, method = dense * ramp, method * ramp
        outcome = summarise(dense, method)
        stamped += outcome.status == "invalid" and outcome.message.startswith("drift")
    assert stamped / trials >= 0.95


def test_constant_times_have_no_trend():
    assert timing_statistics.trend(np.ones(20)).p == 1.0
    assert timing_statistics.stepped(np.ones(20), floor=0.1) is None


def test_outliers_are_flagged_kept_and_harmless():
    rng = np.random.default_rng(4)
    dense, method = 2.0 * noise(rng, 20, spread=0.01), noise(rng, 20, spread=0.01)
    dense[7], method[13] = 30.0, 9.0
    outcome = summarise(dense, method)
    assert outcome.valid
    assert outcome.outliers == [7, 13]
    assert outcome.ratio.value == pytest.approx(2.0, rel=0.02)
    assert len(outcome.raw["first_ms"]) == 20 and outcome.raw["first_ms"][7] == 30000.0


def test_slow_first_blocks_are_warm_up():
    rng = np.random.default_rng(5)
    dense, method = noise(rng, 16, spread=0.02), noise(rng, 16, spread=0.02)
    method[0] *= 8
    assert summarise(dense, method).warmup == 1
    method[:3] *= [1, 4, 2]
    outcome = summarise(dense, method)
    assert outcome.warmup == 3 and outcome.blocks == 13
    assert outcome.ratio.value == pytest.approx(1.0, rel=0.03)


def test_a_late_outlier_is_not_warm_up():
    times = np.ones((30, 2))
    times[9] = 5.0
    assert timing_statistics.warmup_blocks(times) == 0


def test_a_long_slow_start_is_not_settled_until_the_new_level_lasts():
    times = np.where(np.arange(40) < 8, 2.0, 1.0)[:, None] * np.ones((1, 2))
    assert timing_statistics.warmup_blocks(times[:16]) is None
    assert timing_statistics.warmup_blocks(times[:24]) == 8


def test_too_few_blocks_are_refused():
    outcome = summarise(np.full(9, 2.0), np.ones(9))
    assert outcome.status == "invalid" and "too few blocks: 9" in outcome.message


def test_too_little_work_is_refused():
    short = run_of(np.full(12, 2.0), np.ones(12), device_seconds=np.full(12, 0.01))
    outcome = timing.summarise([short], "method", Settings(min_seconds=3.0))
    assert outcome.status == "invalid" and "too little timed work" in outcome.message


def test_a_throttled_device_is_refused():
    hot = [{"throttle_reasons": 0x20, "sm_clock_mhz": 900.0}]
    assert summarise(np.full(12, 2.0), np.ones(12), states=hot).message.startswith("throttled")
    capped = [{"throttle_reasons": 0x4}]
    assert summarise(np.full(12, 2.0), np.ones(12), states=capped).valid


@pytest.mark.parametrize("change", [{"blocks": 9}, {"resamples": 100}, {"min_seconds": -1.0}])
def test_settings_refuse_what_would_weaken_the_result(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"{name} must be"):
        Settings(**change)


def recorded(log, name, seconds):
    def call(value):
        log.append((name, value))
        return seconds

    return call


def test_arms_run_in_palindromes_on_the_same_rotating_inputs():
    log: list = []
    arms = [Arm(name, recorded(log, name, 0.04)) for name in "ab"]
    outcome = timing.compare(
        *arms, inputs=[0, 1, 2], timer=SyntheticTimer(), settings=Settings(min_seconds=1.59)
    )
    measured = log[4:]  # after the two calls of each arm that calibrate
    assert [name for name, _ in measured[:8]] == list("abbaabba")
    assert [value for _, value in measured[:12]] == 4 * [0] + 4 * [1] + 4 * [2]
    # Four blocks of each input, though ten would do.
    assert outcome.blocks == 12 and outcome.device_seconds == pytest.approx(1.92)
    assert outcome.raw["period"] == 3
    assert outcome.order == "palindrome" and outcome.ratio.value == 1.0


def test_long_passes_alternate_their_order():
    log: list = []
    arms = [Arm(name, recorded(log, name, 5.0)) for name in "ab"]
    outcome = timing.compare(*arms, inputs=0, timer=SyntheticTimer())
    assert [name for name, _ in log[4:12]] == list("abbaabba")
    assert len(log) == 4 + 20 and outcome.order == "alternating"


def test_short_calls_repeat_until_there_is_enough_work():
    outcome = timing.compare(
        lambda x: 2e-4, lambda x: 1e-4, inputs=0, timer=SyntheticTimer(), min_seconds=1.0
    )
    assert outcome.valid and outcome.device_seconds >= 1.0
    assert outcome.repeats[1] > outcome.repeats[0] > 1
    assert outcome.ratio.value == pytest.approx(2.0)
    assert outcome.first_ms.value == pytest.approx(0.2)


def test_set_up_is_outside_the_timed_window():
    events: list = []

    class Around:
        def __enter__(self):
            events.append("enter")

        def __exit__(self, *exception):
            events.append("exit")

    class Watching(SyntheticTimer):
        def run(self, call, inputs):
            events.append("timed")
            return super().run(call, inputs)

    arm = Arm("b", lambda x: 1.0, Around)
    timing.compare(lambda x: 1.0, arm, inputs=0, timer=Watching())
    text = " ".join(events)
    assert "enter timed exit" in text and "enter exit" not in text
    assert events.count("enter") == events.count("exit")


def test_a_wrong_output_makes_the_result_invalid():
    outcome = timing.compare(
        lambda x: 1.0,
        lambda x: 0.5,
        inputs=[1, 2],
        timer=SyntheticTimer(),
        check=lambda arm, index, output: "off by one" if output == 0.5 else None,
    )
    assert outcome.message == "output check failed for second: off by one"


def test_a_drifting_run_is_measured_again_and_kept():
    state = {"calls": 0}

    def method(value):
        state["calls"] += 1
        return 1.0 + 0.05 * min(state["calls"], 12)

    outcome = timing.compare(lambda x: 1.0, method, inputs=0, timer=SyntheticTimer())
    assert outcome.valid and outcome.attempts == 2
    assert len(outcome.raw["discarded"]) == 1


def test_many_arms_are_each_compared_with_the_first():
    arms = [Arm(n, lambda x, s=s: s) for n, s in (("dense", 0.4), ("fast", 0.1), ("slow", 0.8))]
    found = timing.compare_all(arms, inputs=0, timer=SyntheticTimer())
    assert [round(found[arm.name].ratio.value, 6) for arm in arms] == [1.0, 4.0, 0.5]


def test_arms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names"):
        timing.compare_all([Arm("a", abs), Arm("a", abs)], inputs=0, timer=SyntheticTimer())


def test_real_clock_gives_a_record():
    outcome = timing.compare(
        lambda n: sum(range(n)), lambda n: sum(range(n // 4)), inputs=[4000, 4001], min_seconds=0.05
    )
    assert outcome.blocks >= 10
    assert outcome.first_ms.low <= outcome.first_ms.value <= outcome.first_ms.high
    assert set(outcome.to_dict()) >= {"ratio", "raw", "regime", "states", "warmup", "outliers"}
