import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from shardtrain.errors import MeshError
from shardtrain.mesh import abstract_mesh, build_mesh, device_grid, layouts, resolve_sizes
from shardtrain.strategy import AXES, Strategy


@dataclass(frozen=True)
class FakeDevice:
    """What mesh building reads of a device."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    platform: str = "cpu"
    device_kind: str = "cpu"
    core_on_chip: int = 0


def cpu_hosts(processes: int, each: int) -> list[FakeDevice]:
    return [FakeDevice(id=i, process_index=i // each) for i in range(processes * each)]


def tpu_slice(
    shape: tuple[int, int, int], slice_index: int = 0, first: int = 0
) -> list[FakeDevice]:
    """A TPU v4 topology: one device per chip, four chips per process."""
    coords = [(x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0])]
    return [
        FakeDevice(
            id=first + i,
            process_index=(first + i) // 4,
            slice_index=slice_index,
            coords=c,
            platform="tpu",
            device_kind="TPU v4",
        )
        for i, c in enumerate(coords)
    ]


@pytest.mark.parametrize(
    "text", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=-1,tensor=2", "expert=2,context=4"]
)
def test_every_device_is_in_the_mesh_once(devices, text):
    mesh = build_mesh(Strategy.parse(text))
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in devices]
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 6


def test_minus_one_fills():
    assert resolve_sizes(Strategy(data=-1, tensor=2), 8)["data"] == 4
    assert resolve_sizes(Strategy(fsdp=-1), 1)["fsdp"] == 1


def test_a_subset_of_devices_must_be_asked_for(devices):
    with pytest.raises(MeshError, match="data=3 x tensor=2 = 6 devices asked, 8 present"):
        build_mesh(Strategy(data=3, tensor=2))
    assert build_mesh(Strategy(data=3, tensor=2), devices[:6]).devices.size == 6


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Strategy(), r"data=1 = 1 devices asked, 8 present\. Layouts that fit: data=8"),
        (
            Strategy(data=2, fsdp=2, tensor=4),
            r"16 devices asked, 8 present\. Layouts that fit: data=2,fsdp=2,tensor=2 .* "
            r"Or st\.simulate\(16\)",
        ),
        (
            Strategy(data=-1, tensor=3),
            r"the other axes multiply to 3, which does not divide 8 devices\. Layouts that fit: .*"
            r"data=4,tensor=2",
        ),
    ],
)
def test_misfit_lists_layouts_that_fit(devices, strategy, message):
    with pytest.raises(MeshError, match=message):
        build_mesh(strategy)


def test_layouts_multiply_to_the_device_count():
    for text in layouts(12, ["data", "fsdp", "tensor"]):
        assert math.prod(int(part.split("=")[1]) for part in text.split(",")) == 12
    assert layouts(8, ["data", "tensor"])[0] in ("data=2,tensor=4", "data=4,tensor=2")


def test_tensor_is_the_innermost_axis(devices):
    grid = build_mesh(Strategy(data=2, tensor=4)).devices.reshape(2, 4)
    assert [[d.id for d in row] for row in grid] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def grid_of(strategy: Strategy, fakes: list[FakeDevice]) -> np.ndarray:
    sizes = resolve_sizes(strategy, len(fakes))
    return device_grid(sizes, strategy.dcn, fakes)


def test_dcn_puts_an_axis_across_processes():
    strategy = Strategy(data=4, tensor=2, dcn={"data": 2})
    grid = grid_of(strategy, cpu_hosts(2, 4)[::-1])
    assert grid.shape == (4, 1, 1, 1, 1, 2)
    hosts = np.vectorize(lambda d: d.process_index)(grid).reshape(4, 2)
    np.testing.assert_array_equal(hosts, [[0, 0], [0, 0], [1, 1], [1, 1]])
    assert len({d.id for d in grid.flat}) == 8


def test_dcn_over_two_axes():
    strategy = Strategy(data=2, fsdp=4, dcn={"data": 2, "fsdp": 2})
    grid = grid_of(strategy, cpu_hosts(4, 2))
    hosts = np.vectorize(lambda d: d.process_index)(grid).reshape(2, 4)
    np.testing.assert_array_equal(hosts, [[0, 0, 1, 1], [2, 2, 3, 3]])


def test_dcn_goes_across_slices_where_there_are_slices():
    fakes = tpu_slice((2, 2, 2), 0) + tpu_slice((2, 2, 2), 1, first=8)
    grid = grid_of(Strategy(data=2, fsdp=8, dcn={"data": 2}), fakes)
    slices = np.vectorize(lambda d: d.slice_index)(grid).reshape(2, 8)
    np.testing.assert_array_equal(slices, [[0] * 8, [1] * 8])
    assert len({d.id for d in grid.flat}) == 16


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 2, 1), "data=2,tensor=2"),
        ((4, 4, 1), "fsdp=8,tensor=2"),
        ((4, 4, 4), "data=4,fsdp=4,tensor=4"),
        ((2, 2, 4), "fsdp=-1"),
    ],
)
def test_described_tpu_topologies_use_every_chip(shape, text):
    fakes = tpu_slice(shape)
    grid = grid_of(Strategy.parse(text), fakes)
    assert sorted(d.id for d in grid.flat) == list(range(math.prod(shape)))


def test_tensor_neighbours_on_a_tpu_are_neighbours_in_the_torus():
    grid = grid_of(Strategy(data=4, fsdp=4, tensor=4), tpu_slice((4, 4, 4))).reshape(16, 4)
    for row in grid:
        for a, b in zip(row, np.roll(row, 1), strict=True):
            hops = [min((p - q) % 4, (q - p) % 4) for p, q in zip(a.coords, b.coords, strict=True)]
            assert sum(hops) == 1


def test_wrong_number_of_slices_is_refused():
    with pytest.raises(MeshError, match=r"asks for 4 slices or hosts, but the devices form 2 with"):
        grid_of(Strategy(data=8, dcn={"data": 4}), cpu_hosts(2, 4))
    uneven = [*cpu_hosts(1, 5), *(FakeDevice(id=i, process_index=1) for i in range(5, 8))]
    with pytest.raises(MeshError, match=r"form 2 with \[3, 5\] devices each"):
        grid_of(Strategy(data=8, dcn={"data": 2}), uneven)


def test_dcn_must_divide_a_filled_axis():
    with pytest.raises(MeshError, match="dcn data=3 does not divide data=4"):
        resolve_sizes(Strategy(data=-1, tensor=2, dcn={"data": 3}), 8)


def test_abstract_mesh_needs_no_devices():
    mesh = abstract_mesh(Strategy(data=512, tensor=8), 4096)
    assert (mesh.size, mesh.shape["tensor"]) == (4096, 8)
    assert mesh.axis_types == (AxisType.Auto,) * 6
    with pytest.raises(MeshError, match="4096 present"):
        abstract_mesh(Strategy(data=3), 4096)


def test_sharding_over_the_mesh_places_rows_in_mesh_order(devices):
    mesh = build_mesh(Strategy(data=4, tensor=2))
    spec = jax.sharding.PartitionSpec("data")
    x = jax.device_put(np.arange(8), jax.sharding.NamedSharding(mesh, spec))
    rows = {s.device.id: s.data.tolist() for s in x.addressable_shards}
    assert rows[0] == rows[1] == [0, 1]
    assert rows[6] == rows[7] == [6, 7]
