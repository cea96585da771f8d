"""Replica groups in every syntax, against numpy and against literals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from shardtrain.planner.replica_groups import (
    expand_iota,
    groups_are_whole,
    parse_pairs,
    parse_replica_groups,
    varying_axes,
)

SYNTAXES = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true": [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ],
    "replica_groups={}": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "replica_groups={{0, 4}, {1, 5}, {2, 6}, {3, 7}}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=[2,4]<=[8], to_apply=%add": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=[4,2]<=[2,4]T(1,0)": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=[4,2]<=[2,2,2]T(2,0,1)": [[0, 2], [4, 6], [1, 3], [5, 7]],
    "replica_groups=[1,8]<=[8]": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}": [
        [0, 1, 2, 3, 4, 5, 6, 7]
    ],
    "replica_groups=mesh['a'=2,'b'=4] {'a'}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh[a=2,b=4] {b}": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "replica_groups=mesh['a'=8] {'a':(1)2}": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=8] {'a':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "replica_groups=mesh['a'=8] {'a':(4)2}": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ],
    "replica_groups=mesh['a'=2,'b'=4], device_ids=(3,1,0,2,7,6,5,4) {'b'}": [
        [3, 1, 0, 2],
        [7, 6, 5, 4],
    ],
}


@pytest.mark.parametrize("text", SYNTAXES)
def test_every_syntax_gives_the_groups_xla_means(text):
    assert parse_replica_groups(text, 8) == SYNTAXES[text]


def test_text_without_groups_gives_none():
    assert parse_replica_groups('dimensions={0}, metadata={op_name="x"}', 8) is None
    assert parse_pairs("replica_groups={{0,1}}") is None


def test_source_target_pairs():
    text = "channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={}"
    assert parse_pairs(text) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert parse_pairs("source_target_pairs={}") == []


@hs.composite
def meshes(draw):
    shape = tuple(draw(hs.lists(hs.integers(1, 4), min_size=1, max_size=4)))
    chosen = tuple(d for d in range(len(shape)) if draw(hs.booleans()))
    return shape, chosen


def groups_by_numpy(shape, chosen):
    """Groups along the chosen dims, as sets, by walking all devices."""
    groups: dict[tuple, set[int]] = {}
    for position, place in enumerate(itertools.product(*map(range, shape))):
        key = tuple(c for d, c in enumerate(place) if d not in chosen)
        groups.setdefault(key, set()).add(position)
    return sorted(map(sorted, groups.values()))


@given(meshes())
def test_iota_form_is_numpy_reshape_and_transpose(mesh):
    shape, chosen = mesh
    rest = [d for d in range(len(shape)) if d not in chosen]
    order = [*rest, *chosen]
    width = math.prod(shape[d] for d in chosen)
    count = math.prod(shape) // width
    text = f"replica_groups=[{count},{width}]<=[{','.join(map(str, shape))}]"
    text += f"T({','.join(map(str, order))})"
    found = parse_replica_groups(text, math.prod(shape))
    assert sorted(map(sorted, found)) == groups_by_numpy(shape, chosen)
    assert expand_iota([count, width], shape, order).tolist() == found


@given(meshes())
def test_mesh_form_agrees_with_walking_the_devices(mesh):
    shape, chosen = mesh
    axes = ",".join(f"'ax{d}'={size}" for d, size in enumerate(shape))
    named = ",".join(f"'ax{d}'" for d in chosen)
    found = parse_replica_groups(f"replica_groups=mesh[{axes}] {{{named}}}", math.prod(shape))
    assert sorted(map(sorted, found)) == groups_by_numpy(shape, chosen)


@given(meshes())
def test_groups_along_axes_are_recognised_as_those_axes(mesh):
    shape, chosen = mesh
    groups = groups_by_numpy(shape, chosen)
    assert varying_axes(groups, shape) == tuple(d for d in chosen if shape[d] > 1)
    assert groups_are_whole(groups, shape)


@given(meshes(), hs.randoms())
def test_the_order_of_groups_and_members_does_not_matter(mesh, random):
    shape, chosen = mesh
    groups = groups_by_numpy(shape, chosen)
    random.shuffle(groups)
    for group in groups:
        random.shuffle(group)
    assert varying_axes(groups, shape) == tuple(d for d in chosen if shape[d] > 1)
    assert groups_are_whole(groups, shape)


@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        ([[0, 1], [2, 3]], (4,)),  # half of an axis
        ([[0, 3], [1, 2]], (2, 2)),  # a diagonal
        ([[0, 1], [2], [3]], (2, 2)),  # uneven
        ([[0, 0]], (2,)),  # one device twice
        ([[0, 9]], (2, 2)),  # outside the mesh
        ([[0, 1], [0, 2]], (2, 2)),  # different axes in different groups
    ],
)
def test_groups_that_are_no_axes_are_not_whole(groups, shape):
    assert not groups_are_whole(groups, shape)


def test_varying_axes_outside_the_mesh_is_none():
    assert varying_axes([[0, 8]], (2, 2, 2)) is None
    assert varying_axes(np.array([[0, 7]]), (2, 2, 2)) == (0, 1, 2)
