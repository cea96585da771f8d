"""From the loss of an unmodified model to the pieces a pipeline runs.

The loss is traced once. Its repeated block becomes one function, the *block*, and the rest of the
program falls into functions of the microbatch:

| piece | computes | runs |
|---|---|---|
| `pre` | the first block's input (embedding; blocks before the pipelined ones) | before stage 0 |
| `sides` | what blocks read beside the last output: masks, positions, rng keys | per stage |
| `block` | one layer | on its stage |
| `post` | loss, weight, metrics from the last output | after the last stage |
| `pre_state` | new values of variables that no block changes (rng counters) | before the loop |

Everything is decided on the traced program, so it does not matter how the model is written.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.errors import StageSplitError
from shardtrain.modules import ModelForm
from shardtrain.modules.losses import LossOutput
from shardtrain.pipeline import blocks, classify
from shardtrain.pipeline.jaxprs import Program, flatten
from shardtrain.pipeline.markers import BlockGroup, candidates, find_groups, marked
from shardtrain.pytree import leaves_by_path, path_string

LossFn = Callable[[Any, Any, Any, jax.Array], tuple[LossOutput, Any]]


@dataclasses.dataclass(frozen=True)
class Trace:
    """A flattened loss and what its inputs and outputs are.

    Attributes:
        program: the flat program.
        params, variables: path -> input variable of the program.
        batch, key: input variables of the batch leaves and of the rng key.
        new_variables: path -> output of the program.
        output: the outputs that form `LossOutput`, and its tree.
    """

    program: Program
    params: dict[str, jex.Var]
    variables: dict[str, jex.Var]
    batch: list[jex.Var]
    key: jex.Var
    new_variables: dict[str, Any]
    output: list[Any]
    output_tree: Any


def trace_loss(loss_fn: LossFn, params: Any, variables: Any, batch: Any) -> Trace:
    """Trace `loss_fn(params, variables, batch, key)` on abstract values; computes nothing."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (params, variables, batch, key)
    closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(*args)
    program = flatten(closed)
    names = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(args)]
    by_part: list[dict[str, jex.Var]] = [{}, {}, {}, {}]
    for name, var in zip(names, program.invars, strict=True):
        part, _, path = name.partition("/")
        by_part[int(part)][path] = var
    output_shapes, new_shapes = shapes
    num_out = len(jax.tree.leaves(output_shapes))
    new_names = leaves_by_path(new_shapes)
    return Trace(
        program, by_part[0], by_part[1], list(by_part[2].values()), by_part[3][""],
        dict(zip(new_names, program.outvars[num_out:], strict=True)),
        program.outvars[:num_out], jax.tree.structure(output_shapes),
    )  # fmt: skip


def extract(
    make_loss: Callable[[Callable[..., Any]], LossFn],
    user_loss: Callable[..., Any],
    form: ModelForm,
    microbatch: Any,
    num_chunks: int,
    block: str | None = None,
    groups: list[BlockGroup] | None = None,
) -> classify.Extracted:
    """Split the loss of an unmodified model into pipeline pieces.

    Args:
        make_loss: makes the pure loss from a user's `fn(model, batch[, rngs])`.
        user_loss: the user's loss function.
        form: the model's functional form.
        microbatch: abstract batch of one microbatch, `[global_batch_size / num_microbatches, ...]`.
        num_chunks: into how many equal pieces the blocks are cut (stages x virtual stages).
        block: path of the repeated block (`"layers/*"`), if the model has several.
        groups: the sibling modules to try; None: all there are.

    Raises:
        StageSplitError: no repeated block, blocks that differ, skip connections, or too few
            blocks; says what was looked for and the first difference.
    """
    reasons = []
    if groups is None:
        own = (form.base or form).abstract_params
        groups = [] if form.kind == "functional" else find_groups(own)
    groups = candidates(groups, block) if form.kind != "functional" else []
    abstract = (form.abstract_params, form.abstract_variables, microbatch)
    for group in groups:
        trace = trace_loss(make_loss(marked(user_loss, form.kind, group)), *abstract)
        found = blocks.from_marks(trace.program, group, num_chunks)
        if isinstance(found, str):
            reasons.append(f"{group.pattern} ({len(group.paths)} modules): {found}")
            continue
        try:
            return dataclasses.replace(classify.classify(trace, found), group=group)
        except StageSplitError as error:
            reasons.append(f"{group.pattern} ({len(group.paths)} modules): {error}")
    trace = trace_loss(make_loss(user_loss), *abstract)
    found = blocks.from_scan(trace.program, set(trace.params.values()), num_chunks)
    if not isinstance(found, str):
        return classify.classify(trace, found)
    reasons.append(found)
    raise StageSplitError(
        f"{form.name} cannot be split into {num_chunks} pipeline stages. Looked for sibling "
        "modules that repeat and for a scan over stacked parameters:\n  "
        + "\n  ".join(reasons)
        + "\n"
        "Use a number of stages that divides the layers, point at the block with its path, or use "
        "pipeline=1."
    )
