"""Before the first step: do all processes run the same thing?

Processes that lower different programs do not fail, they wait for each other for ever. Comparing a
few short facts first turns that into one sentence that names the odd one out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from shardtrain.errors import DistributedError

Facts = Mapping[str, str]
"""Name of a fact (program, jax version, config, batch) → short value or hash."""


def fingerprint(*parts: str | bytes) -> str:
    """16 hex digits of SHA-256 over the parts; for program text, config, batch bytes.

    Example:
      >>> fingerprint("abc")
      'ce91dc5eec0139ad'
    """
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def disagreements(table: Sequence[Facts]) -> tuple[str, ...]:
    """One sentence per fact that is not equal on all processes.

    Args:
      table: facts of process 0, 1, ...; a missing fact counts as the value '(missing)'.

    Example:
      >>> disagreements([{"jax": "0.10"}, {"jax": "0.10"}, {"jax": "0.11"}])
      ("jax: process 2 has '0.11', processes 0, 1 have '0.10'",)
    """
    sentences = []
    for name in dict.fromkeys(name for facts in table for name in facts):
        values = [facts.get(name, "(missing)") for facts in table]
        if len(set(values)) == 1:
            continue
        # The smallest group first: it is the odd one out.
        groups = sorted(Counter(values).items(), key=lambda item: item[1])
        sentences.append(f"{name}: " + ", ".join(_group(value, values) for value, _ in groups))
    return tuple(sentences)


def _group(value: str, values: Sequence[str]) -> str:
    members = [str(i) for i, other in enumerate(values) if other == value]
    if len(members) == 1:
        return f"process {members[0]} has {value!r}"
    return f"processes {', '.join(members)} have {value!r}"


def check_agreement(
    facts: Facts, exchange: Callable[[Facts], Sequence[Facts]] | None = None
) -> None:
    """Compare this process's facts with those of all others. Collective: all must call it.

    Args:
      facts: what should be the same everywhere; values are compared as text.
      exchange: gives the facts of all processes in order; default: over the accelerators' network.

    Raises:
      DistributedError: on every process, naming the fact and the odd process out.
    """
    table = (exchange or exchange_facts)(facts)
    if found := disagreements(table):
        raise DistributedError(
            f"the {len(table)} processes do not run the same thing; training would hang or be "
            "wrong:\n  " + "\n  ".join(found) + "\nStart all processes from the same code, "
            "packages, configuration and data."
        )


def exchange_facts(facts: Facts) -> tuple[Facts, ...]:
    """All processes' facts, in process order. Collective."""
    if jax.process_count() == 1:
        return (facts,)
    content = json.dumps(dict(facts)).encode()
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(content)))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return tuple(
        json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths, strict=True)
    )
