"""The time that a run will take; oracle: clocks that the test sets."""

import pytest

from darts_min.run import progress
from darts_min.run.progress import duration, forecast


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (3600, "1 h 0 min")]
    + [(7199, "2 h 0 min"), (86399, "24 h 0 min"), (86400, "1 d 0 h"), (400000, "4 d 15 h")],
)
def test_durations_are_written_in_the_units_that_matter(seconds, text):
    assert duration(seconds) == text


def test_the_forecast_leaves_the_first_steps_out_and_passes_every_batch_on(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    seen = []
    for i in forecast(range(30), 1000, lines.append, 30):
        seen.append(i)
        clock[0] += 100.0 if i < 3 else 0.5
    assert seen == list(range(30))
    assert lines == ["0.500 s a step (the first: 100.0 s): about 8 min to go"]


@pytest.mark.parametrize("length, lines", [(1, 0), (2, 0), (3, 1), (5, 1), (13, 1), (14, 1)])
def test_a_short_pass_is_timed_on_the_steps_that_it_has(length, lines):
    logged = []
    assert list(forecast(range(length), 1000, logged.append, length)) == list(range(length))
    assert len(logged) == lines
