"""A launched process that takes part in one collective and prints on which addresses it listens."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

import shardtrain as st

LISTEN = "0A"  # of the kernel's table of TCP sockets


def listening():
    """Local addresses, in hex, of this process's listening sockets; Linux only."""
    mine = set()
    for descriptor in Path("/proc/self/fd").glob("*"):
        try:
            mine.add(os.readlink(descriptor).removeprefix("socket:[").rstrip("]"))
        except OSError:  # closed meanwhile
            continue
    tables = [Path(f"/proc/self/net/{name}") for name in ("tcp", "tcp6")]
    lines = [x.split() for t in tables if t.exists() for x in t.read_text().splitlines()[1:]]
    return [x[1].split(":")[0] for x in lines if x[3] == LISTEN and x[9] in mine]


st.init_distributed()
both = multihost_utils.process_allgather(np.int32([jax.process_index()]))
print("listens", both.ravel().tolist(), *sorted(listening()))
