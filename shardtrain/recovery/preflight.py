"""Before the first step: do all processes run the same program on the same data?

Design. Each process reads only its own rows, so none has a whole batch to compare. But a batch is
`f(seed, step)` and any process can ask for any row of it: each reads the same few rows for itself,
through its own source, order and transform, and only their digests travel. A process whose files,
tokenizer, order or random numbers are its own gives itself away there, whoever owns the rows.
"""

from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from shardtrain.data import DataLoader
from shardtrain.monitoring import check_agreement, fingerprint
from shardtrain.plan import Plan

_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_ROWS = 8

Loaders = Mapping[str, DataLoader | None]


def check_run(plan: Plan, loaders: Loaders, settings: Mapping[str, Any]) -> None:
    """Several processes: all are about to run the same thing. Collective, compiles nothing.

    Args:
      plan: What will be trained.
      loaders: Where the batches come from, by what they are for ("data", "eval data").
      settings: Of the loop: a process that saves or evaluates at other steps would wait for ever.

    Raises:
      DistributedError: On every process; names what differs and the odd process out.
    """
    if jax.process_count() > 1:
        check_agreement(run_facts(plan, loaders, settings))


def check_first_batch(loader: DataLoader, step: int, skip: Collection[int] = ()) -> None:
    """Several processes: all would read the same batch for `step`, and leave out the same steps.

    Raises:
      DistributedError: On every process; names the leaf and the odd process out.
      DataError: This process cannot read the rows.
    """
    if jax.process_count() > 1:
        check_agreement({"steps left out": str(sorted(skip)), **first_batch_facts(loader, step)})


def run_facts(plan: Plan, loaders: Loaders, settings: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same on all processes: versions, configuration, data set, program."""
    facts: dict[str, Any] = {name: metadata.version(name) for name in _PACKAGES}
    facts |= {**settings, **plan.describe()}
    for use, loader in loaders.items():
        described = {"": None} if loader is None else loader.describe()
        facts |= {f"{use} {name}".rstrip(): value for name, value in described.items()}
    facts |= {"program": fingerprint(plan.program_text())}
    return {name: str(value) for name, value in facts.items()}


def first_batch_facts(loader: DataLoader, step: int) -> dict[str, str]:
    """Structure, dtypes and shapes of a global batch, and a digest per leaf of a few of its rows.

    Args:
      loader: Reads up to 8 rows, spread evenly over the batch, as `batch(step)` would.
      step: 0, 1, 2, ...

    Example:
      >>> loader = DataLoader({"x": np.arange(10, dtype="f")}, global_batch_size=4, shuffle=False)
      >>> first_batch_facts(loader, 0)["first batch x"]
      'float32[4] d53411144c2696b3'
    """
    rows = np.unique(np.linspace(0, loader.global_batch_size - 1, _ROWS).astype(np.int64))
    read, abstract = loader.rows(step, rows), loader.abstract_batch
    leaves = zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(read), strict=True)
    shown = ", ".join(map(str, rows.tolist()))
    facts = {"first batch": f"step {step + 1}, rows {shown} of {jax.tree.structure(abstract)}"}
    for (path, want), leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "(itself)"
        shape = ",".join(map(str, want.shape))
        digest = fingerprint(leaf.tobytes())
        facts[f"first batch {name}"] = f"{want.dtype}[{shape}] {digest}"
    return facts
