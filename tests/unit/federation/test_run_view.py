"""What is going on in a run, how long it will take, and how logs and terminals show it."""

import io
import re

import pytest
from rich.console import Console

from silotune.core.types import Failure, Update
from silotune.federation.progress_lines import LiveProgress, PlainProgress
from silotune.federation.run_view import RunView

METRICS = {"train_loss": 1.5, "num_tokens": 900, "seconds": 10.0}
NAMES = ("north", "south")


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def update(client, round_=1):
    return Update(client, round_, {}, 3, METRICS, {}, bytes_down=2_000, bytes_up=1_000)


def visit(view, time, client, *, score_s=2.0, step_s=1.0, steps=4, round_=1):
    """One client's part of a round: it scores for 2 s, then takes 4 steps of 1 s."""
    view.client_begins(client)
    view.client_scores(client, 0, 1)
    time.now += score_s
    view.client_scores(client, 1, 1)
    view.client_steps(client, 0, steps, 0)
    for n in range(1, steps + 1):
        time.now += step_s
        yield
        view.client_steps(client, n, steps, 100 * n)
    view.client_done(update(client, round_))


def test_time_left_is_known_within_the_first_client_and_counts_the_last_scoring():
    time = Time()
    view = RunView(time)
    view.begin(3, 1)
    view.has_clients(2)
    view.begin_round(1, NAMES)
    assert view.seconds_left() is None
    part = visit(view, time, "north")
    next(part), next(part)  # one step is done; the second is on its way
    time.now -= 1  # as at the moment of that event
    # a visit is 6 s: 2 clients x 3 rounds x 6 s + 2 scores of 2 s, of which 3 s are over
    assert view.seconds_left() == pytest.approx(36 + 4 - 3)


def test_time_left_falls_to_nothing_as_a_run_goes_on():
    time, seen = Time(), []
    view = RunView(time)
    view.begin(2, 1)
    view.has_clients(2)
    for round_ in (1, 2):
        view.begin_round(round_, NAMES)
        for name in NAMES:
            for _ in visit(view, time, name, round_=round_):
                seen.append((time.now, view.seconds_left()))
        view.end_round(round_, [])
    view.begin_scoring(NAMES)
    for name in NAMES:
        view.client_scores(name, 0, 1)
        time.now += 2
        view.client_scores(name, 1, 1)
        view.client_scored(name)
        seen.append((time.now, view.seconds_left()))
    whole = 2 * 2 * 6 + 2 * 2
    assert all(left == pytest.approx(whole - now) for now, left in seen if left is not None)
    assert len([left for _, left in seen if left is None]) <= 1  # before the first step ended
    assert seen[-1][1] == 0


def test_clients_that_train_at_the_same_time_are_not_counted_one_after_another():
    time = Time()
    view = RunView(time)
    view.begin(3, 1)
    view.has_clients(2)
    view.begin_round(1, NAMES)
    time.now = 10
    view.client_done(update("north"))
    assert view.seconds_left() == pytest.approx(20)  # two more rounds like this one
    assert "waiting for south" in view.now()


def test_bytes_count_as_they_come_and_a_round_corrects_them():
    view = RunView(Time())
    view.begin(2, 1)
    view.has_clients(2)
    view.begin_round(1, NAMES)
    view.client_done(update("north"))
    assert view.headline().startswith("round 1/2, 3.0 kB sent")
    view.end_round(1, [{"event": "train", "status": "ok", "bytes_up": 5_000, "bytes_down": 5_000}])
    assert view.size_bytes == 10_000


def test_a_step_has_its_place_and_rate_and_a_failure_its_code():
    time = Time()
    view = RunView(time)
    view.begin(1, 1)
    view.has_clients(2)
    view.begin_round(1, NAMES)
    part = visit(view, time, "north", step_s=0.5)
    next(part), next(part)
    assert view.clients["north"].words() == "step 1/4, 200 tokens/s"
    view.client_failed(Failure("south", 1, "timeout", "no answer"))
    assert view.clients["south"].words() == "timeout"


def told(kind, width=80, height=24):
    shown = io.StringIO()
    live = {"force_terminal": True, "color_system": None} if kind is LiveProgress else {}
    live |= {"width": width, "height": height, "soft_wrap": kind is PlainProgress}
    progress = kind(Console(file=shown, highlight=False, **live))
    progress.clock = Time()
    progress._began = progress._last = progress.round_began = progress.stage_began = 0.0
    return progress, shown


def drawn(progress, width=80):
    shown = io.StringIO()
    Console(file=shown, width=width, height=24).print(progress._picture())
    return [line.rstrip() for line in shown.getvalue().splitlines()]


def test_a_log_gets_few_lines_and_is_never_silent_for_long():
    progress, shown = told(PlainProgress)
    time = progress.clock
    progress.begin(1, 1)
    progress.has_clients(1)
    progress.begin_round(1, ["north"])
    progress.client_begins("north")
    progress.client_steps("north", 0, 100_000, 0)
    said = []
    for n in range(1, 36_001):  # ten hours of steps of one second
        time.now += 1
        before = shown.tell()
        progress.client_steps("north", n, 100_000, 100 * n)
        if shown.tell() > before:
            said.append(time.now)
    gaps = [b - a for a, b in zip([0.0, *said], said, strict=False)]
    assert max(gap for gap, at in zip(gaps, said, strict=True) if at <= 300) == 5
    assert max(gaps) <= 61
    assert len(said) < 1000
    line = shown.getvalue().splitlines()[-1]
    assert re.fullmatch(
        r"  round 1/1, about 17 h \d\d min left; north: step 3\d{4}/100000, 100 tokens/s", line
    )


def test_a_step_without_events_is_told_as_well():
    progress, shown = told(PlainProgress)
    progress.doing("loading the base")
    progress.clock.now = 6
    progress.beat()
    assert shown.getvalue().splitlines() == ["loading the base", "  loading the base, 6 s"]


def test_a_terminal_of_80_columns_shows_every_client_in_one_line_each():
    progress, _ = told(LiveProgress)
    names = ["Nordklinikum Köln am Rhein, Station 3", "south\x1b[2J"]
    progress.begin(12, 1)
    progress.has_clients(2)
    try:
        progress.begin_round(1, names)
        progress.client_begins(names[0])
        progress.client_steps(names[0], 12, 50, 1234)
        progress.client_failed(Failure(names[1], 1, "x" * 200, "somewhere"))
        lines = drawn(progress)
    finally:
        progress.end()
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    assert "step 12/50" in lines[1]
    assert lines[1].startswith("Nordklinikum Köln am Rh…  step 12/50")
    assert "\x1b" not in "".join(lines)


def test_a_thousand_clients_fit_a_terminal_and_the_busy_one_is_shown():
    progress, _ = told(LiveProgress)
    names = [f"client {n:04d}" for n in range(1000)]
    progress.begin(1, 1)
    progress.has_clients(1000)
    try:
        progress.begin_round(1, names)
        progress.client_steps("client 0777", 1, 2, 10)
        lines = drawn(progress)
    finally:
        progress.end()
    assert len(lines) <= 24
    assert any("client 0777" in line and "step 1/2" in line for line in lines)
    assert "and 980 clients more" in lines[-1]


def test_what_is_said_to_go_on_is_what_goes_on():
    progress, shown = told(PlainProgress)
    with progress.ticking():
        progress.clock.now = 6
        progress.beat()
        progress.note("[1/12] local")
        progress.clock.now = 12
        progress.beat()
    lines = shown.getvalue().splitlines()
    assert lines == ["  starting, 6 s", "[1/12] local", "  still working"]


def test_work_between_two_clients_is_not_taken_for_the_last_scoring():
    view = RunView(Time())
    view.begin(2, 1)
    view.begin_round(1, NAMES)
    view.doing("training on the server's rows")
    assert view.headline() == "training on the server's rows, 0 s"
    view.begin_round(2, NAMES)
    assert view.headline().startswith("round 2/2")
    view.begin_scoring(NAMES)
    assert view.headline() == "scoring the final adapter: 0 of 2 clients"
