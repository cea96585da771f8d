"""One of several processes: `ROOT TASK ...` restores checkpoints under plans and saves them anew.

A task is `SOURCE:STRATEGY:TARGET`: directories below ROOT and a strategy.
"""

import sys
from pathlib import Path

import jax
from checkpoint_plan_models import make_plan

import shardtrain as st

st.init_distributed()
root = Path(sys.argv[1])
for task in sys.argv[2:]:
    source, strategy, target = task.split(":")
    plan = make_plan(strategy, jax.device_count())
    with st.Checkpointer(root / source, plan) as checkpointer:
        state = checkpointer.restore()
    wanted = jax.tree.leaves(plan.abstract_state)
    for leaf, abstract in zip(jax.tree.leaves(state), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    with st.Checkpointer(root / target, plan) as checkpointer:
        checkpointer.save(state)
