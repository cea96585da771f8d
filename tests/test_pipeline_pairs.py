"""Every schedule with every kind of model: loss, gradients, variables equal one device.

What kinds there are is what a stage can hold: dropout at a rate per layer and tied embeddings, a
scan of rematerialised layers, rng counters and a parameter that all blocks read, batch statistics,
auxiliary losses, two alternating layers. Pairs that `test_pipeline_executor.py` has are left out.
"""

import functools

import pytest
from pipeline_models import LinenModel, NnxModel
from pipeline_runs import Pipelined, quickly

MODELS = {
    "rates": LinenModel("rates"),
    "scan remat": LinenModel("scan remat"),
    "alternating": LinenModel("alternating"),
    "plain": functools.partial(NnxModel, mode="plain"),
    "norm": functools.partial(NnxModel, mode="norm"),
    "aux list": functools.partial(NnxModel, mode="aux list"),
}
# The second stage's gradients of one microbatch are read three ticks after they were sent.
CSV = """\
0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3
1F0,1B0,1F1,1F2,1F3,1B1,1B2,1B3
"""
SPLIT_CSV = """\
0F0,0F1,0F2,0F3,0I0,0W0,0I1,0I2,0W1,0W2,0I3,0W3
1F0,1I0,1F1,1F2,1F3,1W0,1I1,1W1,1I2,1I3,1W2,1W3
"""
ALL = ("gpipe", "1f1b", "interleaved", "zero-bubble")
PAIRS = [
    *(("rates", schedule) for schedule in (*ALL, "csv")),
    *(("scan remat", schedule) for schedule in ALL),
    *(("plain", schedule) for schedule in (*ALL, "csv") if schedule != "gpipe"),
    *(("norm", schedule) for schedule in ALL if schedule != "1f1b"),
    *(("aux list", s) for s in (*ALL, "split csv") if s != "interleaved"),
    ("alternating", "zero-bubble"),
]


def check(model, schedule, stages, microbatches=4, virtual=1):
    run = Pipelined(MODELS[model], schedule, {"pipeline": stages}, microbatches, virtual)
    step, args = run.lowered()
    run.assert_like_one_device(quickly(step, args)(*args))


@pytest.mark.parametrize(("model", "schedule"), PAIRS)
def test_every_schedule_runs_every_model(model, schedule, tmp_path, devices):
    virtual = 2 if schedule == "interleaved" else 1
    if schedule.endswith("csv"):
        path = tmp_path / "mine.csv"
        path.write_text(SPLIT_CSV if schedule == "split csv" else CSV)
        schedule = str(path)
    check(model, schedule, 2, virtual=virtual)


@pytest.mark.parametrize("schedule", ["gpipe", "zero-bubble"])
def test_fewer_microbatches_than_stages(schedule, devices):
    check("aux list", schedule, 4, microbatches=2)
