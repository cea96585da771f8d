"""Programs of other compilers than the one here, as text: TPU, GPU, and forms written by hand.

`data/hlo/tpu_*.txt` and `gpu_*.txt` are real: compiled without hardware by libtpu 0.0.42.1 for
v5e:2x4 and by jax 0.10.2's CUDA plugin for one H100 host, then freed of backend configs, layouts
and metadata that are not read. `*_megatron_fsdp`: four layers of a residual MLP, width 1024 to
4096, batch 4096, bfloat16, fsdp=4 x tensor=2.
"""

from pathlib import Path

import numpy as np
import pytest

from shardtrain.planner.assertions import assert_collectives
from shardtrain.planner.collectives import parse_collectives
from shardtrain.planner.flops import count_flops
from shardtrain.planner.hlo import Array, arrays_of, parse_hlo
from shardtrain.planner.lints import lint_collectives
from shardtrain.planner.traffic import total_bytes

DATA = Path(__file__).parent / "data" / "hlo"
MESH = (("fsdp", "tensor"), np.arange(8).reshape(4, 2))
LAYERS, WIDTH, HIDDEN, BATCH, BF16 = 4, 1024, 4096, 4096, 2
KERNEL = WIDTH * HIDDEN * BF16 // 2  # of one layer, on one tensor shard
ACTIVATION = BATCH // 4 * WIDTH * BF16  # on one fsdp shard


def golden(name):
    return (DATA / f"{name}.txt").read_text()


def test_tpu_program_communicates_what_zero_3_and_megatron_say():
    found = parse_collectives(golden("tpu_v5e_megatron_fsdp"), *MESH)
    # Two kernels per layer: gathered forward and again in the rematerialised backward; gradients
    # reduced into their shards; one activation per layer reduced each way.
    assert_collectives(
        found,
        {
            ("all-gather", "fsdp"): (2 * 2 * LAYERS, 2 * 2 * LAYERS * KERNEL),
            ("reduce-scatter", "fsdp"): (2 * LAYERS, 2 * LAYERS * KERNEL),
            ("all-reduce", "tensor"): (2 * LAYERS, 2 * LAYERS * ACTIVATION),
        },
    )
    gathers = {(c.parameter, c.is_async, c.count) for c in found if c.kind == "all-gather"}
    # `down` is gathered in an asynchronous chain that the text repeats nine times.
    assert gathers == {("p['down']", True, 8), ("p['up']", False, 8)}
    assert {c.source for c in found} == {"/home/me/train.py:11", "/home/me/train.py:12"}


def test_tpu_loops_without_trip_counts_are_counted_by_induction():
    text = golden("tpu_v5e_fsdp_scan")
    assert "known_trip_count" not in text
    found = parse_collectives(text, ("fsdp",), np.arange(8))
    size = 512 * 512
    assert_collectives(
        found,
        {"all-gather": (8, 8 * size * BF16), "reduce-scatter": (4, 4 * size * 4)},
    )
    assert lint_collectives(found) == []


def test_sequence_parallelism_gathers_and_scatters_what_tensor_parallelism_all_reduces():
    """Per layer 4 gathers and 4 reduce-scatters; embeddings and logits the remaining ones."""
    found = parse_collectives(
        golden("gpu_h100_sequence_parallel"), ("data", "tensor"), np.arange(4).reshape(2, 2)
    )
    layers, stream, row_sums = 2, 8 * 16 * 32 * 4, 8 * 16 * 4
    gathers, scatters = 4 * layers + 2, 4 * layers + 1
    gradients, scalars = 12_448 * 4, 13 * 4
    assert_collectives(
        found,
        {
            # The softmax over a sharded vocabulary: its largest logit and its sum, per position.
            ("all-gather", "tensor"): (gathers + 2, gathers * stream + 2 * row_sums),
            ("reduce-scatter", "tensor"): (scatters + 2, scatters * stream + 3 * row_sums),
            "all-reduce": (3, gradients + scalars),
        },
    )


def test_gpu_program_starts_all_collectives_and_marks_those_it_waits_for():
    found = parse_collectives(golden("gpu_h100_megatron_fsdp"), *MESH)
    assert total_bytes(found, kind="reduce-scatter") == 2 * LAYERS * KERNEL
    assert total_bytes(found, axis="tensor") == 2 * LAYERS * ACTIVATION
    # Two kernels forward; backward three, as the compiler gathers one of them twice.
    assert total_bytes(found, kind="all-gather") == 5 * LAYERS * KERNEL
    assert {(c.kind, c.num_operands, c.is_async) for c in found} == {
        ("all-gather", 2, False),
        ("all-gather", 3, False),
        ("reduce-scatter", 2, True),
        ("all-reduce", 1, True),
    }


@pytest.mark.parametrize("name", ["tpu_v5e_megatron_fsdp", "gpu_h100_megatron_fsdp"])
def test_flops_of_the_goldens_are_seven_products_per_layer(name):
    flops = count_flops(parse_hlo(golden(name)))
    # Two forward, one recomputed, four backward; eight devices.
    assert flops.total == 7 * LAYERS * 2 * BATCH * WIDTH * HIDDEN // 8 == 120_259_084_288
    assert flops.is_exact
    assert flops.uncounted == ()


def program(body, rest="", devices=8):
    """A module whose entry has these lines; `%x` is a float32 (16, 8) argument of 512 bytes."""
    return f"""HloModule hand, replica_count=1, num_partitions={devices}
{rest}
ENTRY %main (x: f32[16,8]) -> f32[16,8] {{
  %x = f32[16,8]{{1,0}} parameter(0), metadata={{op_name="params[\\'w\\']"}}
{body}
}}
"""


def parse_hand(body, rest="", mesh=(2, 4)):
    return parse_collectives(program(body, rest), ("a", "b"), np.arange(8).reshape(mesh))


GROUPS = "replica_groups=[2,4]<=[8]"
PAIRS = "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}"
FORMS = {
    "async sugar, nested tuple": (
        f"""  %s = ((f32[16,8]), f32[4,8]) reduce-scatter-start(%x), {GROUPS}, dimensions={{0}}
  ROOT %d = f32[4,8] reduce-scatter-done(%s)""",
        ("reduce-scatter", 512, ("b",), 1, True),
    ),
    "all-gather start, operand and result in the tuple": (
        f"""  %s = (f32[16,8], f32[64,8]) all-gather-start(%x), {GROUPS}, dimensions={{0}}
  ROOT %d = f32[64,8] all-gather-done(%s)""",
        ("all-gather", 2048, ("b",), 1, True),
    ),
    "permute start with its two words of context": (
        f"""  %s = (f32[16,8], f32[16,8], u32[], u32[]) collective-permute-start(%x), {PAIRS}
  ROOT %d = f32[16,8] collective-permute-done(%s)""",
        ("collective-permute", 512, ("b",), 1, True),
    ),
    "a ring through the whole mesh runs over both axes": (
        f"  ROOT %p = f32[16,8] collective-permute(%x), {RING}",
        ("collective-permute", 512, ("a", "b"), 1, False),
    ),
    "in-place permute sends slices of its buffer": (
        f"""  %i = (s32[], s32[]) constant((0, 0))
  ROOT %p = f32[16,8] collective-permute(%x, %x, %i, %i), {PAIRS}, slice_sizes={{{{4,8}}}}""",
        ("collective-permute", 128, ("b",), 1, False),
    ),
    "ragged all-to-all: the input buffer": (
        f"""  %o = s64[4] constant({{0,1,2,3}})
  ROOT %r = f32[16,8] ragged-all-to-all(%x, %x, %o, %o, %o, %o), {GROUPS}""",
        ("ragged-all-to-all", 512, ("b",), 1, False),
    ),
    "broadcast": (
        "  ROOT %r = f32[16,8] collective-broadcast(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        ("collective-broadcast", 512, ("a",), 1, False),
    ),
    "no groups means all devices": (
        "  ROOT %r = f32[16,8] all-reduce(%x), replica_groups={}, to_apply=%add",
        ("all-reduce", 512, ("a", "b"), 1, False),
    ),
    "operands with their types, no percent signs": (
        "  ROOT r = f32[16,8]{1,0} all-reduce(f32[16,8]{1,0} x), replica_groups=[1,8]<=[8]",
        ("all-reduce", 512, ("a", "b"), 1, False),
    ),
    "combined": (
        f"""  %y = bf16[16,8] convert(%x)
  ROOT %r = (f32[16,8], bf16[16,8]) all-reduce(%x, /*index=1*/%y), {GROUPS}""",
        ("all-reduce", 768, ("b",), 1, False),
    ),
    "half of an axis": (
        "  ROOT %r = f32[16,8] all-reduce(%x), replica_groups=[4,2]<=[8]",
        ("all-reduce", 512, ("?",), 1, False),
    ),
    "a position outside the mesh": (
        "  ROOT %r = f32[16,8] all-reduce(%x), replica_groups={{0,8}}",
        ("all-reduce", 512, ("?",), 1, False),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_hand_written_forms(form):
    body, expected = FORMS[form]
    (found,) = parse_hand(body)
    assert (found.kind, found.bytes, found.axes, found.count, found.is_async) == expected


def test_groups_of_one_device_and_permutes_onto_oneself_are_nothing():
    body = "  %r = f32[16,8] all-reduce(%x), replica_groups=[8,1]<=[8]\n"
    body += "  ROOT %p = f32[16,8] collective-permute(%r), source_target_pairs={{0,0},{1,1}}"
    assert parse_hand(body) == []


def test_async_wrapper_is_followed_once_and_lends_its_metadata():
    wrapped = f"""
%inner (q: f32[16,8]) -> f32[4,8] {{
  %q = f32[16,8] parameter(0)
  ROOT %rs = f32[4,8] reduce-scatter(%q), {GROUPS}, dimensions={{0}}, to_apply=%add
}}
"""
    body = """  %s = ((f32[16,8]), f32[4,8], u32[]) async-start(%x), calls=%inner, \
metadata={op_name="grad" source_file="/home/me/train.py" source_line=31}
  ROOT %d = f32[4,8] async-done(%s), calls=%inner"""
    (found,) = parse_hand(body, wrapped)
    assert (found.kind, found.count, found.is_async) == ("reduce-scatter", 1, True)
    assert (found.source, found.operation_name) == ("/home/me/train.py:31", "grad")
    assert found.parameter == "params['w']"


LOOP = """
%body (p: (s32[], f32[16,8], s32[])) -> (s32[], f32[16,8], s32[]) {{
  %p = (s32[], f32[16,8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[16,8] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %g = f32[64,8] all-gather(%w), replica_groups=[2,4]<=[8], dimensions={{0}}
  %keep = f32[16,8] slice(%g), slice={{[0:16], [0:8]}}
  ROOT %t = (s32[], f32[16,8], s32[]) tuple(%next, %w, %n)
}}

%condition (p: (s32[], f32[16,8], s32[])) -> pred[] {{
  %p = (s32[], f32[16,8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %c = pred[] compare({operands}), direction={direction}
}}
"""
START = """  %zero = s32[] constant({start})
  %copy = s32[] copy(%zero)
  %limit = s32[] constant({limit})
  %t = (s32[], f32[16,8], s32[]) tuple(%copy, %x, %limit)
  ROOT %l = (s32[], f32[16,8], s32[]) while(%t), condition=%condition, body=%body"""


@pytest.mark.parametrize(
    ("start", "step", "limit", "operands", "direction", "count"),
    [
        (0, 1, 7, "%i, %n", "LT", 7),
        (0, 2, 8, "%i, %n", "LT", 4),
        (1, 3, 8, "%i, %n", "LE", 3),
        (7, -1, 0, "%i, %n", "GT", 7),
        (7, -1, 0, "%i, %n", "GE", 8),
        (0, 1, 5, "%n, %i", "GT", 5),
        (0, 2, 6, "%i, %n", "NE", 3),
        (5, 1, 3, "%i, %n", "LT", 0),
    ],
)
def test_trip_counts_from_counter_and_limit(start, step, limit, operands, direction, count):
    loop = LOOP.format(step=step, operands=operands, direction=direction)
    found = parse_hand(START.format(start=start, limit=limit), loop)
    assert [c.count for c in found] == ([count] if count else [])
    assert all(c.is_exact for c in found)


def test_a_gather_of_the_same_argument_in_a_loop_is_linted():
    loop = LOOP.format(step=1, operands="%i, %n", direction="LT")
    found = parse_hand(START.format(start=0, limit=7), loop)
    (lint,) = lint_collectives(found)
    assert (lint.kind, lint.bytes) == ("repeated-gather", 6 * 2048)
    assert "params['w'] is gathered over b 7 times per step" in lint.message


def test_unknown_limit_counts_one_pass_and_says_so():
    loop = LOOP.format(step=1, operands="%i, %n", direction="LT")
    start = START.format(start=0, limit=7).replace(
        "constant(7)", 'custom-call(), custom_call_target="f"'
    )
    (found,) = parse_hand(start, loop)
    assert (found.count, found.is_exact) == (1, False)


def test_types():
    assert arrays_of("(bf16[4,2]{1,0:T(8,128)(2,1)S(1)}, pred[], f8e4m3fn[3], s4[5], token[])") == (
        Array("bf16", (4, 2)),
        Array("pred", ()),
        Array("f8e4m3fn", (3,)),
        Array("s4", (5,)),
        Array("token", ()),
    )
    assert [a.bytes for a in arrays_of("(bf16[4,2], f8e4m3fn[3], s4[5], c64[2], f64[<=8])")] == [
        16,
        3,
        3,
        16,
        64,
    ]


CONVOLUTIONS = {
    "product": ("f32[8,16]", "f32[16,4]", "f32[8,4]", "dim_labels=bf_io->bf", 2 * 8 * 16 * 4),
    "3x3, no padding": (
        "f32[2,8,8,3]",
        "f32[3,3,3,16]",
        "f32[2,6,6,16]",
        "window={size=3x3}, dim_labels=b01f_01io->b01f",
        2 * 2 * 36 * 9 * 3 * 16,
    ),
    "3x3, padded: the border multiplies less": (
        "f32[1,4,4,1]",
        "f32[3,3,1,1]",
        "f32[1,4,4,1]",
        "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
        2 * 10 * 10,
    ),
    "depthwise": (
        "f32[1,5,5,8]",
        "f32[3,3,1,8]",
        "f32[1,3,3,8]",
        "window={size=3x3}, dim_labels=b01f_01io->b01f, feature_group_count=8",
        2 * 9 * 9 * 8,
    ),
    "batched product as TPU writes it: a dilated spatial dim": (
        "f32[4,8,16]",
        "f32[4,16,2]",
        "f32[4,8,2]",
        "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
        2 * 4 * 8 * 16 * 2,
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_flops_of_convolutions(name):
    lhs, rhs, out, attributes, expected = CONVOLUTIONS[name]
    text = f"""HloModule c
ENTRY %m (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""
    assert count_flops(parse_hlo(text)).total == expected


CALLS = {
    "cublas": (
        "bf16[64,16]",
        'custom_call_target="__cublas$gemm", backend_config={"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}',
        2 * 64 * 16 * 32,
        (),
    ),
    "cudnn attention": (
        "bf16[2,8,32,16]",
        'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":'
        '{"intermediate_tensor_shape":{"dimensions":["2","8","32","32"]}}}',
        2 * 2 * 2 * 8 * 32 * 32 * 16,
        (),
    ),
    "a kernel that states its cost": (
        "bf16[64,32]",
        'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
        '{"cost_estimate":{"flops":"12345","transcendentals":"0"}}}',
        12345,
        (),
    ),
    "an unknown kernel is named": (
        "bf16[64,32]",
        'custom_call_target="my_kernel"',
        0,
        ("my_kernel",),
    ),
    "a mover of data is not": (
        "bf16[64,32]",
        'custom_call_target="ConcatBitcast"',
        0,
        (),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_flops_of_library_calls(name):
    operand, attributes, expected, uncounted = CALLS[name]
    text = f"""HloModule c
ENTRY %m (a: {operand}) -> bf16[64,32] {{
  %a = {operand} parameter(0)
  ROOT %c = bf16[64,32] custom-call(%a, %a), {attributes}
}}
"""
    found = count_flops(parse_hlo(text))
    assert (found.total, found.uncounted) == (expected, uncounted)


PIECES = """  %c = f32[] constant({value})
  %zeros = f32[64,8] broadcast(%c), dimensions={{}}
  %i = u32[] partition-id()
  %n = u32[] constant(0)
  %whole = f32[{rows},8] dynamic-update-slice(%zeros, %x, %i, %n)
  ROOT %r = f32[{rows},8] all-reduce(%whole), replica_groups=[2,4]<=[8], to_apply=%add"""


def test_an_all_reduce_that_only_puts_pieces_together_is_a_gather():
    (found,) = parse_hand(PIECES.format(value=0, rows=64))
    assert found.is_sum_of_pieces
    assert found.parameter == "params['w']"
    (lint,) = lint_collectives([found])
    # 2 (n-1)/n of 2048 bytes as it is; half of that as an all-gather.
    assert (lint.kind, lint.bytes) == ("gather-by-all-reduce", 1536)


def test_an_all_reduce_of_overlapping_pieces_is_one():
    (found,) = parse_hand(PIECES.format(value=0, rows=32))
    assert not found.is_sum_of_pieces
    assert lint_collectives([found]) == []


PRODUCT = 2 * (BATCH // 4) * WIDTH * HIDDEN // 2  # one matrix product of one layer on one device


def test_products_scheduled_behind_an_asynchronous_collective_are_added_up():
    found = parse_collectives(golden("tpu_v5e_megatron_fsdp"), *MESH)
    # The chain of `down`'s gather runs through one product forward and two backward, per layer.
    assert {c.parameter: c.overlapped_flops for c in found if c.is_async} == {
        "p['down']": 3 * LAYERS * PRODUCT
    }
    found = parse_collectives(golden("gpu_h100_megatron_fsdp"), *MESH)
    behind = {(c.kind, c.overlapped_flops) for c in found if c.is_async}
    # One of the two reductions over `tensor` waits behind two products; nothing else does.
    assert behind == {
        ("reduce-scatter", 0),
        ("all-reduce", 0),
        ("all-reduce", 2 * LAYERS * PRODUCT),
    }
    assert all(c.overlapped_flops == 0 for c in found if not c.is_async)


COMBINED = """HloModule step, is_scheduled=true, num_partitions=2

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter (p0: f32[8,4], p1: f32[6]) -> (f32[4,4], f32[3]) {
  %p0 = f32[8,4] parameter(0)
  %p1 = f32[6] parameter(1)
  %zero = s32[] constant(0)
  %at = s32[] constant(4)
  %both = (f32[8,4], f32[6]) all-reduce(%p0, %p1), replica_groups=[1,2]<=[2], to_apply=%sum
  %first = f32[8,4] get-tuple-element(%both), index=0
  %mine = f32[4,4] dynamic-slice(%first, %at, %zero), dynamic_slice_sizes={4,4}
  %second = f32[6] get-tuple-element(%both), index=1
  %own = f32[3] dynamic-slice(%second, %at), dynamic_slice_sizes={3}
  ROOT %out = (f32[4,4], f32[3]) tuple(%mine, %own)
}

ENTRY %main (x: f32[8,4], y: f32[6]) -> (f32[4,4], f32[3]) {
  %x = f32[8,4] parameter(0)
  %y = f32[6] parameter(1)
  ROOT %f = (f32[4,4], f32[3]) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_fused_reduce_scatter_of_several_gradients_is_one():
    """How v5e programs combine the gradients of all layers: an all-reduce of which shards stay."""
    (found,) = parse_collectives(COMBINED, ("fsdp",), np.arange(2))
    assert (found.kind, found.axes, found.bytes) == ("reduce-scatter", ("fsdp",), (32 + 6) * 4)
    # With one result used whole it is an all-reduce.
    whole = COMBINED.replace(
        "ROOT %out = (f32[4,4], f32[3]) tuple(%mine, %own)",
        "ROOT %out = (f32[4,4], f32[6]) tuple(%mine, %second)",
    )
    (found,) = parse_collectives(whole, ("fsdp",), np.arange(2))
    assert found.kind == "all-reduce"
