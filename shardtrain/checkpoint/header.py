"""What a reader needs to know of a step without the code of the model; plain JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardtrain.checkpoint.leaves import LeafInfo
from shardtrain.errors import CheckpointError

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """The description of one step.

    Attributes:
        step: training step.
        leaves: name → shape, dtype and key kind, in tree order.
        fingerprints: name → mesh-independent hash of the values, at the time of saving.
        plan: `plan.describe()` of the run that saved it.
        mesh: axis sizes, devices and processes it was saved on.
        extra: the user's JSON (loader position, metrics).
        versions: of python, jax, shardtrain's dependencies.
        num_parts: number of manifest parts = processes that saved it.
    """

    step: int
    leaves: dict[str, LeafInfo]
    fingerprints: dict[str, str]
    plan: dict[str, Any]
    mesh: dict[str, Any]
    extra: dict[str, Any]
    versions: dict[str, str]
    num_parts: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the format version."""
        leaves = {
            name: {"shape": list(i.shape), "dtype": i.dtype} | ({"impl": i.impl} if i.impl else {})
            for name, i in self.leaves.items()
        }
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": _FORMAT} | fields | {"leaves": leaves}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Header":
        """The inverse of `to_json`; refuses a newer format."""
        if record["format"] != _FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {record['format']}, this shardtrain reads {_FORMAT}. "
                "Update shardtrain to read it."
            )
        leaves = {
            name: LeafInfo(tuple(leaf["shape"]), leaf["dtype"], leaf.get("impl"))
            for name, leaf in record["leaves"].items()
        }
        fields: dict[str, Any] = {f.name: record[f.name] for f in dataclasses.fields(cls)}
        fields["leaves"] = leaves
        return cls(**fields)
