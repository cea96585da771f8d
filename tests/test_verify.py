"""`st.verify` passes what is right and names what is wrong: planted faults of every kind."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain.errors import VerificationError
from shardtrain.plan.grads import GradientPlan
from shardtrain.train import first_microbatch_key, per_replica, sum_replicas, value_and_grad


class Network(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.up(x))))


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["x"]), batch["y"], batch["mask"])


def make_batch():
    random = np.random.default_rng(0)
    return {
        "x": random.normal(size=(16, 8)).astype("float32"),
        "y": random.integers(0, 4, 16).astype("int32"),
        "mask": (random.random(16) > 0.3).astype("float32"),
    }


def make_plan(strategy="data=2,fsdp=2,tensor=2"):
    return st.plan(Network, loss_fn, optax.adam(1e-2), make_batch(), strategy)


def with_fault(plan, fault):
    """The plan, its gradients passed through `fault`."""
    honest = plan.gradients.grad_fn

    def faulty(*args):
        found = honest(*args)
        return dataclasses.replace(found, grads=fault(found.grads))

    plan.gradients = GradientPlan(faulty, ())
    return plan


def test_a_right_plan_passes_and_says_how_closely(devices):
    report = st.verify(make_plan(), num_steps=2)
    assert report.passed
    assert report.first_difference is None
    assert report.worst.error < 1e-5
    assert str(report).startswith("PASS: loss, gradients, parameters and variables of 2 steps")
    kinds = {d.kind for d in report.differences}
    assert kinds == {"loss", "grad", "param"}
    assert "up/kernel" in str(report.table())


def test_bf16_plans_are_compared_in_float32(devices):
    assert st.verify(make_plan("data=4,fsdp=2,precision=bf16"), num_steps=1).passed


def change(tree, module, leaf, fn):
    return tree | {module: tree[module] | {leaf: fn(tree[module][leaf])}}


FAULTS = {
    "wrong divisor": lambda g: change(g, "up", "bias", lambda x: x / 2),
    "swapped shard": lambda g: change(
        g, "down", "kernel", lambda x: x.reshape(2, -1, 4)[::-1].reshape(x.shape)
    ),
    "lost shard": lambda g: change(g, "up", "kernel", lambda x: x.at[:, 16:].set(0)),
    "not a number": lambda g: change(g, "up", "kernel", lambda x: x.at[0, 0].set(np.nan)),
}
WHERE = {
    "wrong divisor": "up/bias",
    "swapped shard": "down/kernel",
    "lost shard": "up/kernel",
    "not a number": "up/kernel",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_gradient_is_named_by_path(name, devices):
    report = st.verify(with_fault(make_plan(), FAULTS[name]), num_steps=1, find_suspect=False)
    assert not report.passed
    first = report.first_difference
    assert (first.kind, first.path, first.step) == ("grad", WHERE[name], 0)
    with pytest.raises(VerificationError, match=f"grad of {WHERE[name]}.*the loss matches"):
        report.raise_if_failed()


def test_a_missing_sum_over_replicas_is_found(devices):
    plan = make_plan("data=8")
    per = per_replica(value_and_grad(plan.proof_loss), 8, ("data",))

    def only_the_first(*args):
        found = per(*args)
        take = lambda tree: jax.tree.map(lambda x: x[0], tree)
        return dataclasses.replace(found, grads=take(found.grads), output=take(found.output))

    plan.gradients = GradientPlan(only_the_first, ("data",))
    report = st.verify(plan, num_steps=1, find_suspect=False)
    assert not report.passed
    assert report.first_difference.kind == "loss"


def test_the_same_dropout_mask_on_every_device_is_found(devices):
    plan = make_plan("data=8")
    each = per_replica(value_and_grad(plan.proof_loss), 8, ("data",))
    plan.gradients = GradientPlan(sum_replicas(first_microbatch_key(each), lambda g: g), ("data",))
    report = st.verify(plan, num_steps=1, find_suspect=False)
    assert report.first_difference.kind == "loss"


def test_the_suspect_axis_is_named(monkeypatch, devices):
    """A fault that only plans with tensor > 1 have."""
    from shardtrain.plan.core import Plan

    honest = Plan._gradients

    def gradients(plan):
        found = honest(plan)
        if plan.layout.sizes["tensor"] == 1:
            return found
        halve = lambda grads: change(grads, "up", "kernel", lambda x: x / 2)
        inner = found.grad_fn

        def faulty(*args):
            result = inner(*args)
            return dataclasses.replace(result, grads=halve(result.grads))

        return dataclasses.replace(found, grad_fn=faulty)

    monkeypatch.setattr(Plan, "_gradients", gradients)
    report = st.verify(make_plan(), num_steps=1)
    assert report.suspects == ("tensor",)
    assert "suspect: mesh axis tensor" in str(report)
