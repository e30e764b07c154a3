import math

import pytest
import torch

from repro.training import Progress, TrainingConfig, train


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def batches(step):
    generator = torch.Generator().manual_seed(step)
    for _ in range(2):
        x = torch.randn(8, 6, generator=generator)
        yield x, x[:, :2] * x[:, 2:4]


def loss(net, batch):
    x, y = batch
    return torch.nn.functional.mse_loss(net(x), y)


def config(**changes):
    fields = {"steps": 20, "learning_rate": 1e-2, "warmup_steps": 3, "checkpoint_every": 4}
    return TrainingConfig(**{**fields, **changes})


def test_loss_falls():
    seen = []
    train(model(), batches, loss, config(steps=200), hooks=(lambda p: seen.append(p.loss),))
    assert sum(seen[-50:]) < 0.8 * sum(seen[:50])


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_after", [1, 4, 11, 19])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, killed_after):
    whole = model()
    train(whole, batches, loss, config(weight_decay=0.1))

    def kill(progress: Progress):
        if progress.step == killed_after:
            raise Killed

    with pytest.raises(Killed):
        train(model(), batches, loss, config(weight_decay=0.1), folder=tmp_path, hooks=(kill,))
    resumed = model(seed=1) if killed_after >= 4 else model()
    train(resumed, batches, loss, config(weight_decay=0.1), folder=tmp_path)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_training_is_only_loaded(tmp_path):
    first = model()
    train(first, batches, loss, config(), folder=tmp_path)
    again = model(seed=1)
    train(again, batches, loss, config(), folder=tmp_path, hooks=(lambda p: pytest.fail("ran"),))
    assert torch.equal(first[0].weight, again[0].weight)


def test_fresh_start_on_demand(tmp_path):
    train(model(), batches, loss, config(), folder=tmp_path)
    steps = []
    train(
        model(),
        batches,
        loss,
        config(),
        folder=tmp_path,
        resume=False,
        hooks=(lambda p: steps.append(p.step),),
    )
    assert steps == list(range(1, 21))


def test_schedule_rises_holds_and_falls():
    rates = [config(steps=10, warmup_steps=2, decay_steps=4).rate(step) for step in range(10)]
    assert rates == pytest.approx([5e-3] + [1e-2] * 6 + [7.5e-3, 5e-3, 2.5e-3])


def test_frozen_parameters_stay():
    net = model()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    train(net, batches, loss, config())
    assert torch.equal(net[0].weight, before)


def test_elements_with_a_factor_of_zero_stay():
    net, before = model(), model().state_dict()
    rows = torch.ones(16, 1)
    rows[3] = 0
    train(
        net, batches, loss, config(), rate_factors={"0.weight": rows, "2.bias": torch.tensor(0.0)}
    )
    same = {name: value == before[name] for name, value in net.state_dict().items()}
    assert same["0.weight"][3].all() and not same["0.weight"][[0, 1, 2, 4]].any()
    assert same["2.bias"].all() and not same["0.bias"].any()


def test_factors_of_one_change_nothing():
    one, two = model(), model()
    train(one, batches, loss, config())
    train(two, batches, loss, config(), rate_factors={"0.weight": torch.tensor(1.0)})
    assert torch.equal(one[0].weight, two[0].weight)


@pytest.mark.parametrize("clip_each", [True, False])
def test_a_steep_loss_elsewhere_takes_nothing_where_each_is_clipped(clip_each):
    def trained(steepness):
        pair = torch.nn.ModuleList([model(0), model(1)])

        def both(nets, batch):
            return steepness * (1 + batch[0].mean()) * loss(nets[0], batch) + loss(nets[1], batch)

        train(pair, batches, both, config(clip_each=clip_each))
        return pair[1].state_dict().values()

    same = [torch.equal(a, b) for a, b in zip(trained(1e-3), trained(1e3), strict=True)]
    assert all(same) if clip_each else not any(same)


def test_optimizer_can_be_wrapped():
    used = []

    def wrap(optimizer):
        used.append(optimizer)
        return optimizer

    train(model(), batches, loss, config(steps=1), wrap_optimizer=wrap)
    assert len(used) == 1


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(RuntimeError, match="loss must stay finite"):
        train(model(), batches, lambda net, batch: loss(net, batch) * math.inf, config())


@pytest.mark.parametrize("change", [{"steps": 0}, {"learning_rate": 0.0}])
def test_bad_configuration(change):
    with pytest.raises(ValueError, match="TrainingConfig"):
        config(**change)
