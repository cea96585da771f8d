"""What checkpoints need of a plan; any object that has it will do."""

from collections.abc import Mapping
from typing import Any, Protocol


class CheckpointPlan(Protocol):
    """What a `Checkpointer` needs of a plan.

    A plan that stores arrays otherwise than they should lie on disk (stages stacked, dims padded)
    may also have `to_checkpoint(state) -> tree`, `from_checkpoint(tree) -> state` and
    `abstract_checkpoint`, the abstract tree of that form with shardings; and
    `abstract_saved(shapes)`, that tree with shapes that differ in a checkpoint (name -> shape)
    where the plan can convert them.
    """

    @property
    def abstract_state(self) -> Any:
        """The state as `jax.ShapeDtypeStruct`s with the current shardings."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """JSON for the metadata: strategy, model name."""
        ...
