"""Tasks are taken up by urgency, each once, and what is hurried comes before what waited longer."""

from __future__ import annotations

import threading

import pytest

from fxfuse.kernels.urgency import PERHAPS, SOON, UrgentFirst


def test_what_is_waited_for_comes_first() -> None:
    gate, order = threading.Event(), []
    pool = UrgentFirst(1, "test")
    first = pool.submit(gate.wait)
    late = [pool.submit(order.append, f"perhaps {i}", urgency=PERHAPS) for i in range(3)]
    soon = pool.submit(order.append, "soon", urgency=SOON)
    pool.hurry(late[2])
    pool.hurry(first)  # under way: nothing to hurry
    gate.set()
    for future in (*late, soon):
        future.result(10)
    pool.shutdown()
    assert order == ["perhaps 2", "soon", "perhaps 0", "perhaps 1"]


def test_results_errors_and_the_end() -> None:
    pool = UrgentFirst(4, "test")
    numbers = [pool.submit(lambda n: n * n, n) for n in range(100)]
    for future in numbers:
        pool.hurry(future)
    wrong = pool.submit(lambda: 1 // 0)
    pool.shutdown()
    assert [future.result() for future in numbers] == [n * n for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        wrong.result()
