"""Schedules are data: complete, causal, and as cheap as the published formulas say."""

import ast
import dataclasses
import pathlib
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain.errors import ScheduleError
from shardtrain.pipeline import tasks
from shardtrain.pipeline.schedules import SCHEDULES, Schedule, make_schedule, schedule_from_csv
from shardtrain.pipeline.tasks import SlotCosts, Task
from shardtrain.pipeline.validate import validate

STAGES = st.integers(2, 16)
MICROBATCHES = st.integers(1, 40)
GROUPS = st.integers(1, 3)
VIRTUAL = st.integers(1, 4)
EXAMPLES = settings(max_examples=25, deadline=None)


@EXAMPLES
@given(STAGES, MICROBATCHES)
def test_gpipe_and_1f1b_equal_the_published_formulas(p, m):
    gpipe, one = make_schedule("gpipe", p, m), make_schedule("1f1b", p, m)
    for schedule in (gpipe, one):
        assert schedule.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
        assert schedule.simulate_mpmd().bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
    assert gpipe.peak_activations == (m,) * p
    assert one.peak_activations == tuple(min(2 * (p - s) - 1, m) for s in range(p))
    assert one.stash_rows == min(2 * p - 1, m)
    assert one.simulate_mpmd().peak_activations == tuple(min(p - s, m) for s in range(p))


@EXAMPLES
@given(STAGES, GROUPS, VIRTUAL)
def test_interleaved_equals_the_published_formulas(p, groups, v):
    m = groups * p
    schedule = make_schedule("interleaved", p, m, v)
    assert schedule.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))
    assert schedule.time() - schedule.ideal_time() == pytest.approx(4 * (p - 1) / v)
    peak = tuple(min((v + 1) * p - 1 - 2 * s, v * m) for s in range(p))
    assert schedule.peak_activations == peak
    if v > 1:  # L(1 + (p-1)/(p v)) layers at stage 0, in chunks of L/(p v) layers
        assert schedule.simulate_mpmd().peak_activations[0] == min(v * p + p - 1, v * m)


@EXAMPLES
@given(STAGES, MICROBATCHES, VIRTUAL)
def test_interleaved_takes_any_number_of_microbatches(p, m, v):
    schedule = make_schedule("interleaved", p, m, v)
    assert 0 < schedule.bubble_fraction < 1
    assert schedule.stash_rows <= (v + 1) * p - 1


@EXAMPLES
@given(STAGES, GROUPS, VIRTUAL)
def test_zero_bubble_pays_no_weight_gradient_in_its_bubble(p, groups, v):
    m = groups * p
    schedule = make_schedule("zero-bubble", p, m, v)
    costs = SlotCosts(forward=1.0, backward=2.5, weight=0.75)
    bubble = schedule.time(costs) - schedule.ideal_time(costs)
    assert bubble == pytest.approx((p - 1) * (1.0 + 2.5) / v)
    assert schedule.table.weight_rows == min(p, v * m)
    if v == 1 and m >= p:  # arXiv:2401.10241, ZB-H1: (p-1)(TF+TB-TW) and p inputs
        line = schedule.simulate_mpmd(1.0, 1.0, 1.0)
        assert line.bubble_time == pytest.approx((p - 1) * 1.0)
        assert max(line.peak_activations) == p


# P=8, M=32, F=1, B=3 with recompute (2 + 1): time, stash rows, weight-gradient rows.
@pytest.mark.parametrize(
    ("name", "virtual_stages", "time", "stash", "weight_rows"),
    [
        ("gpipe", 1, 156.0, 32, 0),
        ("1f1b", 1, 156.0, 15, 0),
        ("interleaved", 2, 142.0, 23, 0),
        ("interleaved", 4, 135.0, 39, 0),
        ("zero-bubble", 1, 149.0, 15, 8),
        ("zero-bubble", 2, 138.5, 23, 8),
    ],
)
def test_known_prices(name, virtual_stages, time, stash, weight_rows):
    schedule = make_schedule(name, 8, 32, virtual_stages)
    assert schedule.time() == time
    assert schedule.stash_rows == stash
    assert schedule.table.weight_rows == weight_rows
    assert schedule.table.gradient_rows == 1


@EXAMPLES
@given(st.sampled_from(SCHEDULES), STAGES, MICROBATCHES, VIRTUAL)
def test_every_buffer_row_holds_one_value(name, p, m, v):
    """Replay the table as the executor does and check that every read finds its own value."""
    v = v if name in ("interleaved", "zero-bubble") else 1
    schedule = make_schedule(name, p, m, v)
    t = schedule.table
    stash, grads, weights = {}, {}, {}
    for tick in range(schedule.num_ticks):
        sent_x, sent_g = {}, {}
        for s in range(p):
            i, k = int(t.microbatch["F"][tick, s]), int(t.virtual_stage["F"][tick, s]) * p + s
            if i >= 0:
                if k == 0:
                    stash[s, t.stash_row[tick, s]] = (i, 0)
                assert stash[s, t.stash_row[tick, s]] == (i, k)
                sent_x[(s + 1) % p] = (i, k + 1)
            i, k = int(t.microbatch["B"][tick, s]), int(t.virtual_stage["B"][tick, s]) * p + s
            if i >= 0:
                assert stash[s, t.backward_row[tick, s]] == (i, k)
                if k < schedule.num_chunks - 1:
                    assert grads[s, t.gradient_row[tick, s]] == (i, k)
                weights[s, t.weight_row[tick, s]] = (i, k)
                sent_g[(s - 1) % p] = (i, k - 1)
            i, k = int(t.microbatch["W"][tick, s]), int(t.virtual_stage["W"][tick, s]) * p + s
            if i >= 0:
                assert weights[s, t.weight_read_row[tick, s]] == (i, k)
        for s in range(p):
            if t.arrival_row[tick, s] < t.stash_rows:
                stash[s, t.arrival_row[tick, s]] = sent_x[s]
            if t.gradient_arrival_row[tick, s] < t.gradient_rows:
                grads[s, t.gradient_arrival_row[tick, s]] = sent_g[s]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ts: ts[:-1], r"lacks 1 of 24 tasks, first: B of microbatch 3, .* on stage 0"),
        (lambda ts: (*ts, dataclasses.replace(ts[0], tick=30)), r"tick 30, stage 0\) repeats F of"),
        (
            lambda ts: (*ts[:-1], dataclasses.replace(ts[-1], tick=4)),
            r"B of microbatch 3.*tick 4, stage 0\) needs the same slot as B of microbatch 0",
        ),
        (
            lambda ts: tuple(
                dataclasses.replace(t, tick=0)
                if (t.kind, t.stage, t.microbatch) == ("F", 1, 0)
                else t
                for t in ts
            ),
            r"F of microbatch 0.*\(tick 0, stage 1\) reads the result of F of microbatch 0.*one",
        ),
        (lambda ts: (*ts, Task(40, 3, "F", 0, 0)), r"stage must be in 0\.\.2"),
    ],
)
def test_the_validator_names_the_broken_task(change, message):
    good = make_schedule("1f1b", 3, 4)
    with pytest.raises(ScheduleError, match=message):
        Schedule("1f1b", 3, 4, 1, change(good.tasks))
    validate(good)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("1f1", 2, 4), "unknown schedule '1f1': did you mean '1f1b'"),
        (("interleave", 2, 4), "did you mean 'interleaved'"),
        (("gpipe", 2, 0), "num_microbatches=0"),
        (("1f1b", 2, 4, 2), "virtual_stages=2. Use schedule='interleaved'"),
        (("missing.csv", 2, 4), "missing.csv does not exist"),
    ],
)
def test_bad_requests_say_what_to_do(args, message):
    with pytest.raises(ScheduleError, match=message):
        make_schedule(*args)


@pytest.mark.parametrize(
    ("name", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)]
)
def test_csv_round_trip(name, v, tmp_path):
    schedule = make_schedule(name, 4, 8, v)
    path = tmp_path / "mine.csv"
    assert schedule.to_csv(path).splitlines()[0].startswith("0F0,0F1,")
    assert make_schedule(str(path), 4, 8, v).tasks == schedule.tasks
    with pytest.raises(ScheduleError, match="num_stages=4, but the strategy has num_stages=2"):
        make_schedule(str(path), 2, 8, v)


def test_a_classic_csv_is_placed_in_ticks():
    classic = "0F0,0F1,,0B0,,0B1\n,1F0,1B0,SEND_B,1F1,1B1\n"
    schedule = schedule_from_csv(classic)
    assert (schedule.num_stages, schedule.num_microbatches) == (2, 2)
    assert [str(t) for t in schedule.tasks if t.tick == 1] == [
        "F of microbatch 1, virtual stage 0 (tick 1, stage 0)",
        "F of microbatch 0, virtual stage 0 (tick 1, stage 1)",
        "B of microbatch 0, virtual stage 0 (tick 1, stage 1)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1X0,1B0\n", r"row 1, column 0: '1X0' is not <chunk><kind>"),
        ("1F0,1B0\n0F0,0B0\n", r"row 0, column 0: '1F0': chunk 1 belongs to stage 1 of 2"),
        ("0F0,0B0\n1B0,1F0\n", r"wait for each other.*stage 0 at B .*; stage 1 at B"),
        ("0F0,0I0\n1F0,1I0\n", r"input gradient \(I\) needs its weight gradient"),
        ("0F0,0B0,0W0\n1F0,1I0,1W0\n", r"every backward must be I and W"),
        ("\n,\n", "is empty"),
    ],
)
def test_bad_csv_says_where(text, message):
    with pytest.raises(ScheduleError, match=message):
        schedule_from_csv(text)


def test_it_draws_itself():
    schedule = make_schedule("zero-bubble", 2, 2)
    assert str(schedule).splitlines()[1:] == [
        "stage 0 | F0 F1 .  .",
        "        | .  .  B0 B1",
        "        | .  .  W0 W1",
        "stage 1 | .  F0 F1 .",
        "        | .  B0 B1 .",
        "        | .  .  W0 W1",
    ]
    assert schedule._repr_html_().count("<rect") == 12
    assert len(schedule.plot().axes[0].patches) == 12


def test_exact_bubbles_and_identity():
    schedule = make_schedule("1f1b", 4, 8)
    assert Fraction(schedule.bubble_fraction).limit_denominator(100) == Fraction(3, 11)
    assert schedule == make_schedule("1f1b", 4, 8)
    assert hash(schedule) == hash(make_schedule("1f1b", 4, 8))
    assert make_schedule("1f1b", 1, 4).bubble_fraction == 0.0


PURE = [
    "draw",
    "mpmd",
    "orders",
    "schedule_csv",
    "schedule_table",
    "schedules",
    "tasks",
    "validate",
]  # of shardtrain.pipeline


@pytest.mark.parametrize("module", PURE)
def test_schedules_import_no_jax(module):
    source = pathlib.Path(tasks.__file__).with_name(f"{module}.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "shardtrain.pipeline":
            imported |= {f"shardtrain.pipeline.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    known = {"shardtrain.errors", *(f"shardtrain.pipeline.{name}" for name in PURE)}
    assert {name for name in imported if name.startswith("shardtrain")} <= known
    assert not [name for name in imported if name.split(".")[0] in ("jax", "flax", "optax")]
