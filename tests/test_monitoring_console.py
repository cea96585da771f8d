"""What a run says: progress in terminals and logs, metrics files, speed."""

import io
import json
import sys

import jax
import pytest
from rich.console import Console

import shardtrain as st
from shardtrain.errors import ShardtrainError
from shardtrain.hardware import CHIPS
from shardtrain.mesh import build_mesh
from shardtrain.monitoring import throughput
from shardtrain.monitoring.callbacks import RunInfo
from shardtrain.monitoring.console import ConsoleProgress, count_text, duration
from shardtrain.monitoring.metrics_log import MetricsLog, TensorBoardLog, read_metrics
from shardtrain.monitoring.throughput import Rate, chip_of, flops_of

METRICS = {"loss": 2.5, "grad_norm": 0.75, "skipped": 0.0}


class FakePlan:
    """The parts of a plan that speed is computed from: 1000 parameters on eight devices."""

    strategy = st.Strategy(data=8, precision="bf16")
    mesh = build_mesh(st.Strategy(data=8))

    class abstract_state:
        params = {"w": jax.ShapeDtypeStruct((10, 100), "float32")}  # noqa: RUF012


def run_info(first=0, steps=4, directory=None, tokens=2048, is_main=True):
    return RunInfo(FakePlan(), first, steps, directory, 16, tokens, is_main)


def progress(terminal=False, width=80, **kwargs):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=width, highlight=False, no_color=True
    )
    return ConsoleProgress(console, **kwargs), out


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    shown, out = progress(every_seconds=0)
    shown.on_start(run_info(directory=tmp_path))
    shown.on_step(1, METRICS)
    shown.on_step(2, METRICS)
    shown.on_eval(2, {"loss": 2.25, "accuracy": 0.5, "weight": 100.0})
    shown.on_checkpoint(2)
    shown.on_end(None)
    kept, first, second, held_out, saved = out.getvalue().splitlines()
    assert kept == f"compiled programs are kept in {jax.config.jax_compilation_cache_dir}"
    assert first == "step 1/4  loss 2.5000  grad 0.75"
    assert second.startswith("step 2/4  loss 2.5000  grad 0.75  ")
    assert second.endswith(" left")
    assert " tok/s" in second
    assert held_out == "step 2: held-out loss 2.2500, accuracy 0.5000"
    assert saved == "step 2: checkpoint is being written in the background"


def test_plain_lines_are_few_and_the_last_step_is_always_there():
    shown, out = progress(every_seconds=3600)
    shown.on_start(run_info(steps=50, tokens=None))
    for step in range(1, 51):
        shown.on_step(step, METRICS)
    _, first, last = out.getvalue().splitlines()
    assert first.startswith("step 1/50 ")
    assert last.startswith("step 50/50 ")
    assert "examples/s" in last


def test_no_directory_no_checkpoint_line():
    shown, out = progress()
    shown.on_start(run_info())
    before = out.getvalue()
    shown.on_checkpoint(2)
    assert out.getvalue() == before


@pytest.mark.parametrize("width", [80, 120])
def test_live_line_fits_the_terminal(width):
    shown, out = progress(terminal=True, width=width)
    shown.on_start(run_info(first=1, steps=20000))
    for step in (9998, 9999):
        shown.on_step(step, {**METRICS, "loss": 12.3456, "grad_norm": 123.456})
    shown._bar.refresh()
    line = out.getvalue().rsplit("\r", 1)[-1]
    visible = line.split("\x1b[2K")[-1].replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert visible.startswith("9999/20000 ")
    assert "loss 12.3456  grad 123.46  " in visible
    assert len(visible.rstrip("\n")) <= width
    shown.on_end(None)
    assert shown._bar is None


def test_steps_that_were_not_finite_are_counted():
    shown, out = progress(every_seconds=3600)
    shown.on_start(run_info())
    shown.on_step(1, {**METRICS, "skipped": 1.0})
    shown.on_step(2, METRICS)
    shown.on_step(3, {**METRICS, "loss": float("nan"), "skipped": 1.0})
    warned = [line for line in out.getvalue().splitlines() if "not finite" in line]
    assert [line.split(":")[0] for line in warned] == ["step 1", "step 3"]
    assert warned[1].endswith("(2 so far)")


def test_a_finished_run_shows_no_bar():
    shown, out = progress(terminal=True)
    shown.on_start(run_info(first=4, steps=4))
    shown.on_end(None)
    assert out.getvalue() == ""


def test_rate_leaves_pauses_out():
    times = iter([0.0, 1.0, 50.0, 51.0])
    rate = Rate(clock=lambda: next(times))
    assert [rate.tick(), rate.tick()] == [None, 1.0]
    rate.pause()
    assert [rate.tick(), rate.tick()] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_chips_by_their_jax_name(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_mfu_where_the_chip_is_known(monkeypatch):
    assert flops_of(FakePlan(), 2048) is None  # a CPU
    monkeypatch.setattr(throughput, "chip_of", lambda kind: CHIPS["h100"])
    assert flops_of(FakePlan(), None) is None
    operations, peak = flops_of(FakePlan(), 2048)
    assert operations == 6 * 1000 * 2048
    assert peak == 8 * 989.4e12
    shown, _ = progress()
    shown.on_start(run_info())
    shown._rate.seconds = operations / peak / 0.4
    assert "MFU 40%" in shown._text(1, METRICS)


def test_numbers_for_people():
    assert [count_text(c) for c in (0, 999, 1000, 99_499, 99_500, 2_885_888)] == [
        "0", "999", "1.0k", "99.5k", "100k", "2.9M",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]


# ---------------------------------------------------------------- files


def test_metrics_log_has_each_step_once(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    log = MetricsLog(path)
    log.on_start(run_info())
    for step in (1, 2, 3):
        log.on_step(step, {"loss": float(step)})
    log.on_eval(3, {"loss": float("inf")})
    with path.open("a") as file:
        file.write('{"kind": "step", "st')  # killed while writing
    again = MetricsLog(path)
    again.on_start(run_info(first=2))
    again.on_step(3, {"loss": 30.0})
    again.on_checkpoint(3)
    records = [(r["kind"], r["step"], r.get("loss")) for r in read_metrics(path)]
    expected = [("step", 1, 1.0), ("step", 2, 2.0), ("step", 3, 30.0), ("checkpoint", 3, None)]
    assert records == expected


def test_metrics_log_writes_null_for_what_is_not_finite(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"kind": "step", "step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    parsed = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert (parsed["loss"], parsed["grad_norm"]) == (None, None)


def test_only_the_main_process_writes(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.on_start(run_info(is_main=False))
    log.on_step(1, METRICS)
    assert not (tmp_path / "m.jsonl").exists()


def test_unreadable_metrics(tmp_path):
    with pytest.raises(ShardtrainError, match="cannot read"):
        read_metrics(tmp_path / "none.jsonl")
    (tmp_path / "m.jsonl").write_text("oops\n{}\n")
    with pytest.raises(ShardtrainError, match=r"m\.jsonl line 1 is not JSON"):
        read_metrics(tmp_path / "m.jsonl")


def test_tensorboard_writes_events(tmp_path):
    log = TensorBoardLog(tmp_path)
    log.on_start(run_info())
    log.on_step(1, {"loss": 1.5})
    log.on_eval(1, {"loss": 1.25})
    log.on_end(None)
    (events,) = tmp_path.iterdir()
    data = events.read_bytes()
    assert b"train/loss" in data
    assert b"eval/loss" in data


def test_tensorboard_without_its_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ShardtrainError, match=r"pip install 'shardtrain\[tensorboard\]'"):
        TensorBoardLog(tmp_path)
