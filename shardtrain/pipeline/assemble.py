"""Everything a plan needs to train a model as a pipeline, made in one call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from shardtrain.modules import ModelForm
from shardtrain.pipeline.classify import Extracted
from shardtrain.pipeline.extract import LossFn, extract
from shardtrain.pipeline.markers import BlockGroup
from shardtrain.pipeline.schedules import Schedule
from shardtrain.pipeline.stages import (
    StageLayout,
    StageMajor,
    from_stage_major,
    stage_layout,
    to_stage_major,
)
from shardtrain.train.gradients import split_batch


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model split into stages.

    Args:
        model: the loss in pieces.
        schedule: the timetable.
        params: layout of the parameters.
        variables: layout of the model's other variables.
        form: the model with `params` and `variables` as `StageMajor`: `init`, `apply` (not
            pipelined: evaluation and prediction) and `rebuild` take and give that form.
    """

    model: Extracted
    schedule: Schedule
    params: StageLayout
    variables: StageLayout
    form: ModelForm


def make_pipeline(
    form: ModelForm,
    make_loss: Callable[[Callable[..., Any]], LossFn],
    user_loss: Callable[..., Any],
    batch: Any,
    schedule: Schedule,
    block: str | None = None,
    groups: list[BlockGroup] | None = None,
) -> Pipeline:
    """Split an unmodified model for a schedule; computes nothing.

    Args:
        form: the model's functional form.
        make_loss: makes the pure loss `(params, variables, batch, key) -> (sums, new variables)`
            from `user_loss` or a function with the same arguments.
        user_loss: called `(model, batch, ...)`.
        batch: abstract global batch `[B, ...]`.
        schedule: stages, virtual stages and microbatches.
        block: path of the repeated block, if the model has several.
        groups: the sibling modules to try; None: all there are.

    Raises:
        StageSplitError: see `extract`.
    """
    parts = jax.eval_shape(lambda b: split_batch(b, schedule.num_microbatches), batch)
    microbatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    model = extract(make_loss, user_loss, form, microbatch, schedule.num_chunks, block, groups)
    sizes = (model.count, schedule.num_stages, schedule.virtual_stages)
    params = stage_layout(form.abstract_params, model.params, *sizes)
    variables = stage_layout(form.abstract_variables, model.states, *sizes)
    return Pipeline(model, schedule, params, variables, stage_major_form(form, params, variables))


def stage_major_form(form: ModelForm, params: StageLayout, variables: StageLayout) -> ModelForm:
    """The same model with its arrays as `StageMajor`.

    Its annotations are the author's, behind three dims (stage, virtual stage, layer) for blocks.
    """

    def split(values: tuple[Any, Any]) -> tuple[StageMajor, StageMajor]:
        return to_stage_major(values[0], params), to_stage_major(values[1], variables)

    def join(p: StageMajor, v: StageMajor) -> tuple[Any, Any]:
        return from_stage_major(p, params), from_stage_major(v, variables)

    def apply(
        fn: Callable[..., Any],
        p: StageMajor,
        v: StageMajor,
        key: jax.Array,
        train: bool,
        args: tuple[Any, ...],
        calls: Any,
    ) -> tuple[Any, StageMajor]:
        out, new = form.apply(fn, *join(p, v), key, train, args, calls)
        return out, to_stage_major(new, variables)

    abstract = jax.eval_shape(split, (form.abstract_params, form.abstract_variables))
    init = form.init
    return dataclasses.replace(
        form,
        init=None if init is None else lambda key: split(init(key)),
        apply=apply,
        rebuild=lambda p, v: form.rebuild(*join(p, v)),
        abstract_params=abstract[0],
        abstract_variables=abstract[1],
        annotations=_annotations(form.annotations, params),
        initial=None if form.initial is None else split(form.initial),
    )


def _annotations(
    names: dict[str, tuple[Any, ...]], layout: StageLayout
) -> dict[str, tuple[Any, ...]]:
    inside = {p for leaf in layout.leaves for p in leaf.paths}
    found = {f"outer/{path}": axes for path, axes in names.items() if path not in inside}
    for leaf in layout.leaves:
        axes = names.get(leaf.paths[0])
        if axes is not None:
            inner = axes[1:] if leaf.stacked else axes
            found[f"blocks/{leaf.name}"] = (None, None, None, *inner)
    return found
