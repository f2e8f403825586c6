"""forks/wsd.patch against values of the schedule."""

import pytest

from train import Settings, learning_rate


def test_warm_up_then_constant_then_one_minus_a_square_root():
    s = Settings(
        learning_rate=1.0,
        min_lr=0.1,
        warmup_iters=9,
        lr_decay_iters=500,
        max_iters=600,
        cooldown=0.2,
    )
    assert [learning_rate(step, s) for step in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9])
    assert {learning_rate(step, s) for step in range(9, 401)} == {1.0}
    assert learning_rate(425, s) == pytest.approx(0.1 + 0.9 * (1 - 0.5))  # a quarter of the way
    assert learning_rate(449, s) == pytest.approx(0.1 + 0.9 * (1 - 0.7))  # 49 of 100 steps
    assert learning_rate(481, s) == pytest.approx(0.1 + 0.9 * (1 - 0.9))
    assert learning_rate(500, s) == learning_rate(599, s) == 0.1


def test_a_longer_run_has_the_same_rates_until_the_shorter_one_falls():
    """So any checkpoint of the constant part can be trained on, to whatever end."""
    short, long = (
        Settings(learning_rate=1.0, warmup_iters=10, max_iters=n, cooldown=0.2) for n in (100, 1000)
    )
    assert [learning_rate(step, short) for step in range(81)] == [
        learning_rate(step, long) for step in range(81)
    ]


@pytest.mark.parametrize("cooldown, falls_from", [(0.0, 100), (1.0, 10), (0.95, 10)])
def test_the_fall_never_begins_before_the_warm_up_has_ended(cooldown, falls_from):
    s = Settings(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=100, cooldown=cooldown)
    rates = [learning_rate(step, s) for step in range(120)]
    assert next(step for step in range(10, 120) if rates[step] < 1.0) == max(falls_from, 10) + (
        falls_from < 100
    )
    assert rates[100:] == [0.0] * 20 and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(50, Settings(decay_lr=False, learning_rate=1.0)) == 1.0
