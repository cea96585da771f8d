"""What is explored: a catalogue model, or the user's own module measured by tracing it once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from shardtrain.errors import BatchError, LossContractError, ModelError, ShardtrainError
from shardtrain.hardware import chip
from shardtrain.plan import Plan
from shardtrain.plan import plan as make_plan
from shardtrain.planner.catalogue import get
from shardtrain.planner.catalogue_describe import describe_parameters
from shardtrain.planner.catalogue_model import Model
from shardtrain.planner.job import Job
from shardtrain.planner.memory import job_memory
from shardtrain.planner.search import Adjust
from shardtrain.pytree import abstract, leaves_by_path, tree_bytes
from shardtrain.strategy import Strategy

TOKENS = 2**22
"""Tokens of a step when the caller does not say: four million, usual for language models."""


@dataclass(frozen=True)
class Subject:
    """What is trained, as the search sees it.

    Attributes:
        model: its shape.
        global_batch: sequences (or examples) per step.
        sequence: tokens per sequence.
        notes: what was assumed or measured.
        adjust: corrects a search job by what was traced, or refuses it; None for a catalogue model.
        plan: `(strategy, hardware string) -> Plan`; None for a catalogue model.
    """

    model: Model
    global_batch: int
    sequence: int
    notes: tuple[str, ...] = ()
    adjust: Adjust | None = None
    plan: Callable[[Strategy, str], Plan] | None = None


def catalogue_subject(
    model: str | Model, global_batch: int | None = None, sequence: int | None = None
) -> Subject:
    """A model known by its shape.

    Args:
        model: catalogue name or `Model`.
        global_batch: sequences per step; None: four million tokens.
        sequence: tokens per sequence; None: 4096, or what the model's position table holds.
    """
    found = get(model) if isinstance(model, str) else model
    notes = []
    if sequence is None:
        sequence = min(4096, found.positions or 4096)
        notes.append(f"sequence={sequence} assumed")
    if global_batch is None:
        global_batch = max(1, TOKENS // sequence)
        notes.append(f"global_batch={global_batch} assumed ({TOKENS / 1e6:.1f}M tokens)")
    return Subject(found, global_batch, sequence, tuple(notes))


def module_subject(model: Any, loss_fn: Callable[..., Any], optimizer: Any, batch: Any) -> Subject:
    """The user's own model: its shapes, FLOPs and saved activations, from the traced loss.

    Args:
        model: as in `st.plan`.
        loss_fn: as in `st.plan`.
        optimizer: as in `st.plan`.
        batch: one global batch, real or abstract.

    Raises:
        ShardtrainError: what `st.plan` says of the model on one device.
    """
    shapes = abstract(batch)
    base = make_plan(model, loss_fn, optimizer, shapes, Strategy(scan_layers=False), "cpu:1")
    traced = Traced(base, *_batch_size(shapes))
    again = lambda strategy, hardware: base.again(strategy=strategy, hardware=hardware)
    return Subject(traced.model, traced.rows, traced.sequence, traced.notes(), traced.adjust, again)


def _batch_size(batch: Any) -> tuple[int, int]:
    """(rows, tokens in a row; 0 where no leaf looks like tokens)."""
    leaves = [x for x in jax.tree.leaves(batch) if x.ndim]
    if not leaves:
        raise BatchError("the batch has no array with a leading batch dim")
    tokens = [x.shape[1] for x in leaves if x.ndim == 2 and np.issubdtype(x.dtype, np.integer)]
    return leaves[0].shape[0], max(tokens, default=0)


class Traced:
    """One plan on one device, and what its traced program says of every other layout.

    FLOPs come from the traced forward and backward pass, saved bytes from the residuals of its
    vjp under each remat policy, optimizer bytes from the optax state: not from a formula for one
    architecture. The formulas only say how each divides over axes.
    """

    def __init__(self, base: Plan, rows: int, sequence: int):
        self.base, self.rows = base, rows
        state = base.abstract_state
        self.params = leaves_by_path(state.params)
        count = sum(x.size for x in self.params.values())
        assert base.axis_table is not None
        self.flops = float(sum(c.flops for c in base.axis_table().graph.contractions))
        self.model, self.sequence = self._describe(sequence, count)
        self.is_transformer = self.model.attention_count > 0
        self.optimizer_bytes = tree_bytes(state.opt_state) / count
        formula = rows * self.sequence * self.model.flops_per_token(self.sequence, causal=False)
        self.flops_scale = self.flops / formula
        self.is_scalar_loss = self._problem(num_microbatches=2) is not None and rows % 2 == 0

    def _describe(self, sequence: int, count: int) -> tuple[Model, int]:
        """(shape, tokens per row): a transformer's where the parameters look like one."""
        name = self.base.form.name
        shapes = {path: tuple(leaf.shape) for path, leaf in self.params.items()}
        try:
            found = None if _is_convolutional(shapes) else describe_parameters(shapes, name)
        except ModelError:
            found = None
        if found is not None and found.active_matmul:
            each = self.flops / self.rows
            sequence = sequence or max(1, round(each / (6 * found.active_matmul)))
            formula = sequence * found.flops_per_token(sequence, causal=False)
            if 0.4 < each / formula < 2.5:
                return found, sequence
        # Any other network: one block of as many weights, each used so many times per example.
        width = max(1, round((count / 3) ** 0.5))
        uses = max(1, round(self.flops / self.rows / (6 * count)))
        plain = Model(name, 1, width, 1, 1, width, width, 0, attention_layers=0, moe_layers=0,
                      exact=count, source="parameter count and traced FLOPs")  # fmt: skip
        return plain, uses

    def notes(self) -> tuple[str, ...]:
        """What was measured, in sentences."""
        found = [
            f"traced: {self.flops / 1e9:,.1f} GFLOP per step, "
            f"{self.optimizer_bytes:.3g} optimizer bytes per parameter",
        ]
        if not self.is_transformer:
            found.append("no repeated transformer block: only data and fsdp are searched")
        if self.is_scalar_loss:
            found.append(
                "the loss is a bare scalar: several microbatches need equal_microbatches=True, or "
                "a loss that returns st.Mean"
            )
        return tuple(found)

    def adjust(self, job: Job, options: dict[str, Any]) -> Job | str:
        """The job as this model runs it, or why it cannot be run so."""
        if not self.is_transformer and job.tensor * job.pipeline * job.context * job.expert > 1:
            return "no repeated transformer block to split: only data and fsdp"
        for axis in ("tensor", "context", "expert", "pipeline"):
            size = options[axis]
            if size > 1 and (problem := self.axis_problem(axis, size if axis == "tensor" else 2)):
                return problem
        if job.pipeline > 1 and options["remat"] != "full":
            return "a pipeline here recomputes each stage: remat=full says the same"
        scale = self.activation_scale(options["remat"], options["precision"])
        if isinstance(scale, str):
            return scale
        options["equal_microbatches"] = self.is_scalar_loss and options["num_microbatches"] > 1
        return job.replace(
            optimizer_bytes=self.optimizer_bytes, flops_scale=self.flops_scale,
            activation_scale=scale, causal=False, flash=False,
        )  # fmt: skip

    @functools.cache  # noqa: B019  (one object per exploration)
    def axis_problem(self, axis: str, size: int) -> str:
        """Why an axis does not help this model, asked of `st.plan` once per size; or ""."""
        changes: dict[str, Any] = {axis: size}
        if axis == "pipeline":
            changes |= {"num_microbatches": size, "remat": "full", "equal_microbatches": True}
            if self.rows % size:
                return ""
        problem = self._problem(**changes)
        return "" if problem is None else problem

    @functools.cache  # noqa: B019  (one object per exploration)
    def activation_scale(self, remat: str, precision: str) -> float | str:
        """Traced residual bytes over the formula's, or why this remat policy cannot be used."""
        strategy = Strategy(remat=remat, precision=precision, scan_layers=False)
        try:
            kept = self.base.again(strategy=strategy).activation_bytes()
        except ShardtrainError as error:
            return str(error)
        policy = {"none": "none", "full": "full"}.get(remat, "selective")
        job = Job(self.model, chip("cpu"), 1, self.sequence, self.rows, remat=policy,
                  precision=precision, flash=False)  # fmt: skip
        formula = job_memory(job)
        return max(kept, 1) / (formula.activations + formula.logits)

    def _problem(self, **changes: Any) -> str | None:
        """What `st.plan` says against a strategy on as many devices as it needs."""
        strategy = Strategy(**changes, scan_layers=False)
        devices = int(np.prod(list(strategy.sizes.values())))
        try:
            made = self.base.again(strategy=strategy, hardware=f"cpu:{devices}")
        except LossContractError as error:
            return str(error)
        except ShardtrainError as error:
            return f"{strategy}: {error}"
        against = [f for f in made.findings if "is better" in f or "nothing shards" in f]
        return against[0] if against else None


def _is_convolutional(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether most weights are in kernels with two small spatial dims."""
    sizes = {path: int(np.prod(shape)) for path, shape in shapes.items()}
    spatial = [p for p, s in shapes.items() if len(s) == 4 and max(s[:2]) <= 11]
    return sum(sizes[p] for p in spatial) > 0.5 * sum(sizes.values())
