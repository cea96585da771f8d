"""Drawings: what they say, and that no window or pyplot state is touched."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain import viz
from shardtrain.mesh import abstract_mesh, build_mesh
from shardtrain.viz.mesh import batch_shards
from shardtrain.viz.parameters import drawn_dims, holders


def linear_plan(strategy):
    model = st.Functional(init=lambda key: {"w": jnp.zeros((8, 16)), "b": jnp.zeros((16,))})
    loss = lambda v, batch: st.Mean(jnp.sum((batch["x"] @ v["w"] + v["b"]) ** 2), batch["x"].size)
    return st.plan(model, loss, optax.adam(0.1), {"x": np.ones((8, 8), "float32")}, strategy)


def test_mesh_text_of_three_axes():
    drawn = viz.mesh_text(build_mesh(st.Strategy(data=2, fsdp=2, tensor=2)))
    assert drawn.splitlines() == [
        "               tensor 0  tensor 1",
        "data 0 fsdp 0         0         1",
        "       fsdp 1         2         3",
        "data 1 fsdp 0         4         5",
        "       fsdp 1         6         7",
    ]


def test_mesh_text_of_one_axis_and_of_one_device():
    drawn = viz.mesh_text(abstract_mesh(st.Strategy(data=3), 3))
    assert drawn.splitlines() == ["  data 0  data 1  data 2", "       0       1       2"]
    assert viz.mesh_text(abstract_mesh(st.Strategy(), 1)) == "one device"


def test_mesh_text_of_a_large_mesh_leaves_the_middle_out():
    lines = viz.mesh_text(abstract_mesh(st.Strategy(data=64, tensor=16), 1024)).splitlines()
    assert (len(lines), max(map(len, lines)) <= 80) == (17, True)
    assert lines[-1].split() == ["data", "63", "1008", "1009", "1010", "...", "1023"]


def test_memory_text_with_a_limit():
    drawn = viz.memory_text({"params": 512, "optimizer": 256}, limit=1024, width=4)
    assert drawn.splitlines() == [
        "params     ██    512 B",
        "optimizer  █     256 B",
        "total      768 B of 1.0 KiB (75%)",
    ]


def test_loss_figure_has_both_curves_and_leaves_out_what_is_not_finite(tmp_path):
    records = [
        {"kind": "eval", "step": 0, "loss": 5.5},
        {"kind": "step", "step": 1, "loss": 5.0},
        {"kind": "step", "step": 2, "loss": None},
        {"kind": "step", "step": 3, "loss": float("nan")},
        {"kind": "step", "step": 4, "loss": 4.0},
        {"kind": "checkpoint", "step": 4},
        {"kind": "eval", "step": 4, "loss": 4.25},
    ]
    records[5]["loss"] = 1.0  # not a point of either curve
    figure = viz.loss_figure(records, title="run")
    raw, smoothed, held_out = figure.axes[0].lines
    assert raw.get_xydata().tolist() == [[1, 5.0], [4, 4.0]]
    assert smoothed.get_ydata().tolist() == pytest.approx([5.0, (0.8 * 5 + 4) / 1.8])
    assert held_out.get_xydata().tolist() == [[0, 5.5], [4, 4.25]]
    viz.save(figure, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_notebook_shows_figures_without_magic():
    assert viz.loss_figure([])._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_loss_figure_of_nothing_is_empty():
    assert list(viz.loss_figure([]).axes[0].lines) == []


def test_mesh_figure_colours_devices_by_the_rows_they_read():
    figure = viz.mesh_figure(build_mesh(st.Strategy(data=2, fsdp=2, tensor=2)))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    colors = [p.get_facecolor() for p in axes.patches]
    assert (colors[0] == colors[1], colors[1] == colors[2], len(set(colors))) == (True, False, 4)
    assert batch_shards(["data", "tensor", "fsdp"], [2, 1, 2]).ravel().tolist() == [0, 1, 2, 3]


def test_mesh_figure_refuses_what_cannot_be_read():
    with pytest.raises(ValueError, match="2048 devices"):
        viz.mesh_figure(abstract_mesh(st.Strategy(data=2048), 2048))


def test_memory_figure_stacks_to_the_total():
    memory = linear_plan("fsdp=8").memory()
    axes = viz.memory_figure({"fsdp=8": memory}, limit=2**20).axes[0]
    drawn = sum(bar.get_width() for bar in axes.patches)
    assert drawn * 2**20 == pytest.approx(memory.total)


def test_holders_are_those_that_jax_says():
    mesh = build_mesh(st.Strategy(data=2, fsdp=2, tensor=2))
    assert holders(P("fsdp", "tensor"), 2, mesh) == {
        (0, 0): [0, 4],
        (0, 1): [1, 5],
        (1, 0): [2, 6],
        (1, 1): [3, 7],
    }
    assert holders(P(("fsdp", "tensor")), 1, mesh)[(1,)] == [1, 5]
    assert holders(P(), 1, mesh) == {(0,): [0, 1, 2, 3, 4, 5, 6, 7]}


def test_parameters_figure_draws_each_piece_with_its_devices():
    plan = linear_plan("data=2,fsdp=4")
    figure = viz.parameters_figure(plan)
    weights, bias = figure.axes
    assert [t.get_text() for t in weights.texts] == ["0, 4", "1, 5", "2, 6", "3, 7"]
    assert [len(weights.patches), len(bias.patches)] == [4, 4]
    assert weights.get_title().splitlines() == ["w", "(8, 16): -, fsdp; 128 B each"]


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((4, 8, 16), P("tensor", None, "fsdp"), (0, 2)),
        ((4, 8, 16), P(None, None, "fsdp"), (0, 2)),
        ((4, 8), P(), (0, 1)),
        ((4,), P("fsdp"), (None, 0)),
        ((), P(), (None, None)),
    ],
)
def test_drawn_dims(shape, spec, expected):
    assert drawn_dims(shape, spec) == expected


def test_text_drawings_import_no_matplotlib_and_figures_no_pyplot():
    code = (
        "import sys\nfrom shardtrain import viz\nviz.mesh_text\n"
        "assert 'matplotlib' not in sys.modules\n"
        "viz.loss_figure([{'step': 1, 'loss': 1.0}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_picture():
    with pytest.raises(AttributeError, match="no attribute 'pie'"):
        viz.pie  # noqa: B018
