"""Worker threads with serial torch operations: order, modes, errors, setting of threads."""

import pytest
import torch

from repro import serial_threads


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_threads_are_serial(threads):
    found = serial_threads.run(lambda task: (task, torch.get_num_threads()), range(20))
    assert [task for task, _ in found] == list(range(20))
    assert {number for _, number in found} == {1}
    assert torch.get_num_threads() == threads


def test_nothing_to_do(threads):
    assert serial_threads.run(lambda task: task, []) == []


@pytest.mark.parametrize("inference", [False, True])
def test_modes_of_the_caller_hold_in_the_threads(threads, inference):
    with torch.inference_mode(inference):
        found = serial_threads.run(
            lambda _: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()), range(4)
        )
    assert set(found) == {(inference, False)}


def test_an_exception_reaches_the_caller(threads):
    def fail(task):
        raise ValueError(f"task {task}")

    with pytest.raises(ValueError, match="task 0"):
        serial_threads.run(fail, range(4))
