import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from faulty import NoFunction, task

from slowfast_ext.data import TaskFailure, WorkerPool


@pytest.fixture
def pool():
    pool = WorkerPool(task, 2, timeout=20)
    yield pool
    pool.close()


def results(pool):
    """Outcomes of everything that was submitted, by key."""
    outcomes = {}
    while len(pool):
        outcomes |= dict(pool.wait())
    return outcomes


def test_results_come_back_with_their_keys_from_several_processes(pool):
    for number in range(20):
        pool.submit(number, ("double", number))
    assert results(pool) == {number: 2 * number for number in range(20)}
    assert pool.wait() == []
    pool.submit("first", ("sleep", 0.3))
    pool.submit("second", ("sleep", 0.3))
    assert len({*results(pool).values(), os.getpid()}) == 3


def test_tensors_are_shared_and_outlive_their_process(pool):
    pool.submit(0, ("tensor", 1000))
    (outcome,) = results(pool).values()
    os.kill(outcome["pid"], signal.SIGKILL)
    assert torch.equal(outcome["numbers"], torch.arange(1000).reshape(2, 500))
    assert outcome["zeros"].shape == (0, 3)
    assert outcome["bytes"].tolist() == [1, 2, 3]
    outcome["numbers"][0, 0] = 5  # writable


def test_a_task_that_hangs_is_ended_and_those_behind_it_are_done():
    pool = WorkerPool(task, 1, timeout=1.5)
    pool.submit("hangs", "hang")
    pool.submit("behind", ("double", 4))
    assert results(pool) == {"hangs": TaskFailure("it took longer than 1.5 s"), "behind": 8}
    pool.close()


def test_time_spent_in_the_queue_does_not_count():
    pool = WorkerPool(task, 1, timeout=1.5)
    for away in (0, 2.5):
        for number in range(4):
            pool.submit(number, ("sleep", 0.5))
        time.sleep(away)
        assert not any(isinstance(outcome, TaskFailure) for outcome in results(pool).values())
    pool.close()


def test_a_task_that_ends_its_process_is_named_with_the_signal(pool):
    for request in ("die", "exit"):
        pool.submit(request, request)
        pool.submit("other", ("double", 1))
    outcomes = results(pool)
    assert outcomes["die"].reason == "its process died (SIGKILL, which the system does when memory runs out)"
    assert outcomes["exit"].reason == "its process ended (exit status 3)"
    assert outcomes["other"] == 2


def test_results_sent_before_a_death_are_kept():
    pool = WorkerPool(task, 1, timeout=20)
    pool.submit("tensor", ("tensor", 10))
    pool.submit("die", "die")
    pool.submit("behind", ("double", 3))
    time.sleep(1)
    outcomes = results(pool)
    assert outcomes["tensor"]["numbers"].shape == (2, 5)
    assert isinstance(outcomes["die"], TaskFailure)
    assert outcomes["behind"] == 6
    pool.close()


def test_a_mistake_in_the_function_is_raised_with_its_traceback(pool):
    pool.submit(0, "raise")
    with pytest.raises(RuntimeError, match=r"(?s)a worker process failed:.*in task.*KeyError: 'no such thing'"):
        results(pool)


def test_cancelled_tasks_are_forgotten(pool):
    pool.submit("hangs", "hang")
    pool.submit("waits", ("sleep", 0))
    pool.cancel()
    assert len(pool) == 0
    pool.submit("new", ("double", 2))
    assert results(pool) == {"new": 4}
    pool.close()
    with pytest.raises(RuntimeError, match="the pool must be open, got a closed one"):
        pool.submit(0, ("double", 1))


def test_a_process_that_cannot_start_is_an_error():
    pool = WorkerPool(NoFunction(), 1, timeout=20)
    pool.submit(0, 0)
    with pytest.raises(RuntimeError, match=r"a worker process could not start: its process ended \(exit status 7\)"):
        pool.wait()
    pool.close()


def test_processes_end_with_a_killed_parent_even_where_they_hang(tmp_path):
    marker = tmp_path / "pid"
    program = (
        "import sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from faulty import task\n"
        "from slowfast_ext.data import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(task, 1, None)\n"
        f"    pool.submit(0, ('announce', {str(marker)!r}))\n"
        "    pool.wait()\n"
    )
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen([sys.executable, str(tmp_path / "program.py")]) as parent:
        deadline = time.monotonic() + 60
        while not (marker.exists() and marker.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.kill()
    worker = int(marker.read_text())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{worker}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 1.0), "workers must be at least 1, got 0"), ((1, 0), "timeout must be positive")]
)
def test_impossible_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        WorkerPool(task, *arguments)
