"""How many steps a number of hours is."""

import pytest

from improved_diffusion.run.pace import MEASURED_SECONDS, MEASURED_STEPS, Pace, steps_within


def test_steps_fit_into_the_time():
    assert steps_within(3600, 0.5) == 7200
    assert steps_within(-5, 0.5) == 1


def test_checkpoints_and_pictures_take_their_time():
    options = {
        "seconds_per_save": 2,
        "save_interval": 100,
        "seconds_per_preview": 30,
        "sample_interval": 1000,
    }
    steps = steps_within(3600, 0.5, **options)
    spent = 0.5 * steps + 2 * (steps / 100 + 2) + 30 * steps / 1000
    assert spent == pytest.approx(3600, abs=1)
    without = steps_within(3600, 0.5, **{**options, "sample_interval": 0})
    assert 0.5 * without + 2 * (without / 100 + 2) == pytest.approx(3600, abs=1)


@pytest.mark.parametrize("duration, counted", [(30, MEASURED_STEPS), (MEASURED_SECONDS / 40, 40)])
def test_the_first_steps_are_not_measured(duration, counted):
    now = 0.0
    pace = Pace(clock=lambda: now)
    steps = 0
    while True:
        now += 1000 if steps < MEASURED_STEPS else duration
        steps += 1
        if pace.is_known():
            break
    assert steps == MEASURED_STEPS + counted
    assert pace.seconds_per_step == pytest.approx(duration)
