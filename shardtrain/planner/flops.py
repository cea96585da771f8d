"""Floating-point operations of a compiled step, counted from its HLO.

`Compiled.cost_analysis()` counts the body of a loop once, and GPU programs have none, so a scanned
model would seem as cheap as one layer. Here every dot and convolution is counted with the trip
counts of the loops around it, as two operations per multiply-add. Elementwise work is left out: it
is bound by memory.
"""

import json
import math
import re
from dataclasses import dataclass

import numpy as np

from shardtrain.planner.executions import count_executions
from shardtrain.planner.hlo import Array, Computation, Instruction, Module

_DIM_LABELS = re.compile(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)")
# Custom calls that move or mark data.
_SILENT_CALLS = (
    "AllocateBuffer", "ConcatBitcast", "SliceToDynamic", "PadToStatic", "TopK", "annotate",
    "AsyncCollective", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
    "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked",
)  # fmt: skip


@dataclass(frozen=True)
class Flops:
    """Operations of one step on one device.

    Attributes:
        total: of all dots and convolutions, loops multiplied out.
        is_exact: False when a data-dependent loop or a conditional was counted as one pass.
        uncounted: names of custom kernels whose operations are not known.
    """

    total: int
    is_exact: bool
    uncounted: tuple[str, ...] = ()


def dot_flops(lhs: Array, result: Array, contracting: tuple[int, ...]) -> int:
    """Operations of a (batched) matrix product: 2 x result elements x contracted length.

    Example:
        >>> dot_flops(Array("f32", (8, 16)), Array("f32", (8, 4)), (1,))
        1024
    """
    return 2 * result.size * math.prod(lhs.shape[d] for d in contracting)


def _window(attributes: str, rank: int) -> dict[str, list[int]]:
    """Fields of `window={...}`, one entry per spatial dim; `pad` is the low side."""
    text = (re.search(r"\bwindow=\{([^}]*)\}", attributes) or [""])[0]
    fields = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    found = {}
    for name, default in fields.items():
        match = re.search(rf"\b{name}=([\d_x\-]+)", text)
        parts = match[1].split("x") if match else [str(default)] * rank
        found[name] = [int(part.split("_")[0]) for part in parts]
    return found


def _taps(length: int, out: int, size: int, stride: int, pad: int, dilate: tuple[int, int]) -> int:
    """Multiplications along one spatial dim: window positions that fall on an element of the input.

    TPU programs write batch dims of a product as dilated spatial dims, most of whose positions fall
    between elements; padding is not work either.
    """
    reach = (length - 1) * dilate[0] + 1
    start = np.arange(out, dtype=np.int64) * stride - pad
    total = 0
    for tap in range(size):
        position = start + tap * dilate[1]
        inside = (position >= 0) & (position < reach) & (position % dilate[0] == 0)
        total += int(inside.sum())
    return total


def convolution_flops(lhs: Array, rhs: Array, result: Array, attributes: str) -> int | None:
    """Operations of a convolution, or None when its dims are not labelled."""
    labels = _DIM_LABELS.search(attributes)
    if labels is None:
        return None
    lhs_of = dict(zip(labels[1], lhs.shape, strict=True))
    rhs_of = dict(zip(labels[2], rhs.shape, strict=True))
    result_of = dict(zip(labels[3], result.shape, strict=True))
    spatial = [label for label in labels[1] if label not in "bf"]
    window = _window(attributes, len(spatial))
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    batch = lhs_of["b"] // int(groups[1] if groups else 1)
    total = 2 * batch * rhs_of["i"] * rhs_of["o"]
    for n, label in enumerate(sorted(spatial)):
        total *= _taps(
            lhs_of[label],
            result_of[label],
            window["size"][n],
            window["stride"][n],
            window["pad"][n],
            (window["lhs_dilate"][n], window["rhs_dilate"][n]),
        )
    return total


def _json_field(text: str, name: str) -> list[int]:
    match = re.search(rf'"{name}":\s*(\[[^\]]*\])', text)
    return [int(n) for n in json.loads(match[1])] if match else []


def _custom_call(node: Instruction, operands: list[Array]) -> int | None:
    """Operations of a library kernel; 0 when it only moves data, None when it is not known."""
    target = (re.search(r'custom_call_target="([^"]*)"', node.attributes) or ["", ""])[1]
    stated = re.search(r'"?cost_estimate"?\s*:\s*\{[^}]*"?flops"?\s*:\s*"?(\d+)', node.attributes)
    if stated:
        return int(stated[1])
    if "fmha" in target:
        # Scores and values: 2 products forward; 5 backward, one of them recomputes the scores. What
        # a causal mask saves is not taken off.
        block = re.search(
            r'"intermediate_tensor_shape":.*?"dimensions":(\s*\[[^\]]*\])', node.attributes
        )
        products = 5 if "Backward" in target else 2
        scores = math.prod(int(n) for n in json.loads(block[1])) if block else 0
        return 2 * products * scores * operands[0].shape[-1]
    contracting = _json_field(node.attributes, "lhs_contracting_dimensions")
    if contracting and operands and node.arrays:
        return dot_flops(operands[0], node.arrays[0], tuple(contracting))
    if any(name in target for name in _SILENT_CALLS):
        return 0
    return None


def instruction_flops(computation: Computation, node: Instruction) -> int | None:
    """Operations of one instruction; None when it may compute but it is not known how much."""
    operands = [
        array
        for name in node.operands
        if name in computation.by_name
        for array in computation.by_name[name].arrays
    ]
    if node.opcode == "dot":
        return dot_flops(operands[0], node.arrays[0], node.dims("lhs_contracting_dims"))
    if node.opcode == "convolution":
        return convolution_flops(operands[0], operands[1], node.arrays[0], node.attributes)
    if node.opcode == "custom-call":
        return _custom_call(node, operands)
    return 0


def _name(node: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', node.attributes)
    return target[1] if target else node.opcode


def count_flops(module: Module) -> Flops:
    """Operations of one step on one device.

    Args:
        module: a parsed program.
    """
    total, is_exact, uncounted = 0, True, {}
    computing = ("dot", "convolution", "custom-call")
    for name, at in count_executions(module).items():
        computation = module.computations[name]
        for node in computation.instructions:
            if node.opcode not in computing:
                continue
            flops = instruction_flops(computation, node)
            if flops is None:
                uncounted[_name(node)] = None
                continue
            total += flops * at.count
            is_exact = is_exact and (at.is_exact or flops == 0)
    return Flops(total, is_exact, tuple(uncounted))
