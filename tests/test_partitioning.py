import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as hs
from jax.sharding import PartitionSpec as P

from shardtrain.errors import (
    BatchError,
    DoubleAxisError,
    IndivisibleError,
    PartitionError,
    ReplicationError,
    UnknownAxisError,
    UnusedRuleError,
)
from shardtrain.partitioning import (
    batch_specs,
    check_replication,
    optimizer_specs,
    partition_tree,
)
from shardtrain.partitioning.rules import check_rules, check_used
from shardtrain.pytree import leaves_by_path, matches
from shardtrain.strategy import AXES, Strategy


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def sizes(**given):
    return dict.fromkeys(AXES, 1) | given


def decide(leaf, strategy=None, names=None, **axes):
    """The plan of one parameter `w`."""
    annotations = {"w": names} if names else None
    return partition_tree({"w": leaf}, strategy or Strategy(), sizes(**axes), annotations)["w"]


# -- the FSDP default ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "spec"),
    [
        ((16, 64), P(None, "fsdp")),
        ((64, 16), P("fsdp")),
        ((32, 32), P("fsdp")),  # equal: the first
        ((50257, 64), P(None, "fsdp")),  # the largest does not divide
        ((3, 3, 16, 32), P(None, None, None, "fsdp")),
        ((7, 9), P()),
        ((), P()),
        ((4,), P("fsdp")),
        ((0, 4), P(None, "fsdp")),
    ],
)
def test_fsdp_takes_the_largest_dim_that_divides(dims, spec):
    plan = decide(shape(*dims), fsdp=4)
    assert plan.full == spec
    assert plan.compute == P()
    assert plan.rule == ("fsdp" if spec != P() else "replicated")


def test_the_reason_is_said():
    assert decide(shape(16, 64), fsdp=4).why == "fsdp=4 on dim 1 (largest divisible: 64)"
    assert decide(shape(7, 9), fsdp=4).why == "no dim of (7, 9) is divisible by fsdp=4"
    assert decide(shape(), fsdp=4).why == "a scalar"


@given(
    hs.lists(hs.integers(1, 48), max_size=4),
    hs.sampled_from([1, 2, 3, 4, 8]),
    hs.sampled_from([1, 2, 4]),
    hs.lists(hs.sampled_from([None, "mlp", "heads", "embed", "layers"]), min_size=4, max_size=4),
)
def test_every_decision_divides_and_uses_each_axis_once(dims, fsdp, tensor, names):
    names = names[: len(dims)]
    try:
        plan = decide(shape(*dims), names=tuple(names), fsdp=fsdp, tensor=tensor)
    except (IndivisibleError, DoubleAxisError):
        tensor_dims = [d for d, n in zip(dims, names, strict=True) if n in ("mlp", "heads")]
        assert len(tensor_dims) > 1 or any(d % tensor for d in tensor_dims)
        return
    used = []
    for dim, entry in zip(dims, plan.full, strict=False):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        parts = 1
        for axis in axes:
            used.append(axis)
            parts *= {"fsdp": fsdp, "tensor": tensor}[axis]
        assert dim % parts == 0
    assert len(used) == len(set(used))
    assert all(a != "fsdp" for entry in plan.compute for a in ([entry] if entry else []))


# -- logical names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("embed", "mlp"), P(None, "tensor")),
        (("heads", "embed"), P("tensor")),
        (("vocab", "embed"), P("tensor")),
        (("expert", "mlp"), P("expert", "tensor")),
        ((None, "tensor"), P(None, "tensor")),  # a mesh axis named directly
        ((None, ("mlp", "expert")), P(None, ("tensor", "expert"))),
    ],
)
def test_conventional_names(names, spec):
    assert decide(shape(32, 64), names=names, tensor=2, expert=2).compute == spec


def test_fsdp_goes_to_a_free_dim_beside_the_annotation():
    plan = decide(shape(32, 64), names=("embed", "mlp"), tensor=2, fsdp=4)
    assert (plan.compute, plan.full) == (P(None, "tensor"), P("fsdp", "tensor"))
    assert plan.rule == "annotation"
    assert plan.why == "logical axis 'mlp' → tensor; fsdp=4 on dim 0 (largest divisible: 32)"


def test_fsdp_shares_a_dim_when_no_other_divides():
    plan = decide(shape(3, 64), names=("embed", "mlp"), tensor=2, fsdp=4)
    assert plan.full == P(None, ("tensor", "fsdp"))


def test_fsdp_avoids_the_layer_dim_of_a_stack():
    plan = decide(shape(64, 8, 8), names=("layers", "embed", "mlp"), fsdp=4)
    assert plan.full == P(None, "fsdp")


def test_rules_by_name_win_over_convention():
    rules = {"mlp": None, "embed": ("tensor",)}
    plan = decide(shape(32, 64), Strategy(rules=rules), ("embed", "mlp"), tensor=2)
    assert plan.compute == P("tensor")
    assert plan.why == "rules['embed'] → tensor"


def test_rules_by_glob_win_over_names_and_are_final():
    rules = {"mlp": None, "w": "tensor", "*": (None, ("tensor", "fsdp"))}
    plan = decide(shape(32, 64), Strategy(rules=rules), ("embed", "mlp"), tensor=2, fsdp=4)
    assert (plan.rule, plan.why) == ("rule", "rules['*']")
    assert (plan.compute, plan.full) == (P(None, "tensor"), P(None, ("tensor", "fsdp")))
    whole = decide(shape(32, 64), Strategy(rules={"*": ()}), fsdp=4)
    assert (whole.full, whole.rule) == (P(), "rule")


def test_the_last_glob_that_matches_decides():
    rules = {"**": (), "layer/*": ("fsdp",)}
    tree = {"layer": {"w": shape(8)}, "other": shape(8)}
    plans = partition_tree(tree, Strategy(rules=rules), sizes(fsdp=4))
    assert (plans["layer/w"].full, plans["other"].full) == (P("fsdp"), P())


@pytest.mark.parametrize(
    ("path", "glob", "wanted"),
    [
        ("layers/0/mlp/kernel", "layers/*/mlp/kernel", True),
        ("layers/0/mlp/kernel", "layers/*/kernel", False),
        ("layers/0/mlp/kernel", "layers/**", True),
        ("layers/0/mlp/kernel", "**/kernel", True),
        ("kernel", "**/kernel", True),
        ("layers/0/mlp/kernel", "**/mlp/**", True),
        ("layers/10/w", "layers/?/w", False),
        ("layers/1/w", "layers/[12]/w", True),
        ("a.b", "a*b", True),
        ("axb", "a.b", False),
        ("layers", "layers/**", True),
        ("a/b", "*", False),
        ("a/b", "**", True),
    ],
)
def test_globs(path, glob, wanted):
    assert matches(path, glob) is wanted


# -- errors -------------------------------------------------------------------------------------


def test_indivisible_names_path_numbers_and_remedies():
    with pytest.raises(IndivisibleError) as error:
        decide(shape(768, 12), names=("embed", "heads"), tensor=8)
    text = str(error.value)
    assert "w (768, 12): dim 1 (heads) = 12 is not divisible by tensor=8" in text
    assert "{1, 2, 3, 4, 6, 12}" in text
    assert "make the dim 16" in text
    assert "Strategy(rules={'heads': None})" in text


def test_indivisible_by_a_product_of_axes():
    rules = {"*": (("tensor", "fsdp"),)}
    with pytest.raises(IndivisibleError, match="= 12 is not divisible by tensor=2 x fsdp=4"):
        decide(shape(12), Strategy(rules=rules), tensor=2, fsdp=4)


def test_one_axis_on_two_dims():
    with pytest.raises(DoubleAxisError) as error:
        decide(shape(8, 8), names=("mlp", "heads"), tensor=2)
    text = str(error.value)
    assert "w (8, 8): mesh axis 'tensor' would shard both dim 0 and dim 1" in text
    assert "('mlp', 'heads')" in text
    assert "rules={...: None}" in text


def test_one_axis_twice_in_one_dim():
    with pytest.raises(DoubleAxisError, match="mesh axis 'tensor'"):
        decide(shape(8), Strategy(rules={"*": (("tensor", "tensor"),)}), tensor=2)


def test_unknown_logical_name_suggests_the_nearest():
    with pytest.raises(UnknownAxisError) as error:
        decide(shape(8, 8), names=("embed", "heds"), tensor=2)
    text = str(error.value)
    assert "w: logical axis 'heds' is in no rule" in text
    assert "did you mean 'heads'?" in text
    assert "Strategy(rules={'heds': 'tensor'})" in text
    assert "rules={'heds': None}" in text


def test_rule_to_an_unknown_mesh_axis():
    with pytest.raises(UnknownAxisError, match="'tensr', which does not exist: did you mean 'tens"):
        check_rules({"embed": "tensr"})
    with pytest.raises(UnknownAxisError, match=r"rule 'a/\*' sends a dim to mesh axis 'dp'"):
        check_rules({"a/*": (None, ("fsdp", "dp"))})


def test_rule_with_too_many_entries():
    with pytest.raises(PartitionError, match=r"rule '\*' gives 3 entries, but w has 2 dims"):
        decide(shape(4, 4), Strategy(rules={"*": (None, None, "fsdp")}), fsdp=2)


def test_annotation_that_does_not_fit_the_shape():
    with pytest.raises(PartitionError, match=r"w: annotation \('embed',\) does not fit its shape"):
        decide(shape(4, 4), names=("embed",))


def test_unused_rules():
    paths, names = ["layers/0/kernel"], {"embed"}
    check_used({"layers/*/kernel": (), "embed": None}, paths, names)
    with pytest.raises(UnusedRuleError, match=r"rule 'layer/\*/kernel' matches none of 1 paths"):
        check_used({"layer/*/kernel": ()}, paths, names)
    with pytest.raises(UnusedRuleError, match="'embd' names a logical axis that no parameter has"):
        check_used({"embd": None}, paths, names)


def test_silent_replication_is_refused_by_byte_share():
    tree = {"big": shape(50257, 7), "small": shape(8, 8)}
    plans = partition_tree(tree, Strategy(), sizes(fsdp=4))
    with pytest.raises(ReplicationError) as error:
        check_replication(plans, Strategy(), sizes(fsdp=4))
    text = str(error.value)
    assert "1 of 2 parameters (100% of bytes) are fully replicated on a mesh with fsdp=4" in text
    assert "big (50257, 7) float32, 1,407,196 bytes on each device" in text
    assert "fsdp=1" in text
    assert "allow_replicated=('big',)" in text


def test_replication_may_be_allowed_by_name_or_by_rule():
    tree = {"big": shape(50257, 7), "small": shape(8, 8)}
    for strategy in (
        Strategy(allow_replicated=("b*",)),
        Strategy(allow_replicated="**"),
        Strategy(rules={"big*": ()}),
        Strategy(zero=2),  # parameters are meant to be whole
    ):
        plans = partition_tree(tree, strategy, sizes(fsdp=4))
        check_replication(plans, strategy, sizes(fsdp=4))
    check_replication(partition_tree(tree, Strategy(), sizes(data=8)), Strategy(), sizes(data=8))


def test_small_shares_may_stay_whole():
    tree = {"norm": shape(7), "kernel": shape(64, 64)}
    plans = partition_tree(tree, Strategy(), sizes(fsdp=4))
    check_replication(plans, Strategy(), sizes(fsdp=4))


# -- batches ------------------------------------------------------------------------------------


def test_rows_go_over_the_batch_axes_and_sequences_over_context():
    batch = {"tokens": shape(16, 8), "label": shape(16), "scale": shape()}
    specs = batch_specs(batch, Strategy(), sizes(data=2, fsdp=2, context=2, tensor=2))
    assert specs["label"] == P(("data", "fsdp"))
    assert specs["tokens"] == P(("data", "fsdp"), "context")
    assert specs["scale"] == P()


def test_batch_rules_override():
    strategy = Strategy(rules={"batch/image": (("data", "fsdp"), None, "tensor")})
    specs = batch_specs({"image": shape(8, 4, 4)}, strategy, sizes(data=2, tensor=2))
    assert specs["image"] == P("data", None, "tensor")


def test_indivisible_batch_names_the_nearest_sizes():
    with pytest.raises(BatchError) as error:
        batch_specs({"x": shape(18, 4)}, Strategy(num_microbatches=2), sizes(data=2, fsdp=2))
    assert "batch leaf x: dim 0 = 18 rows" in str(error.value)
    assert "4 batch shards" in str(error.value)
    assert "Nearest batch sizes that work: 16 or 24" in str(error.value)
    with pytest.raises(BatchError, match="that work: 8"):
        batch_specs({"x": shape(3)}, Strategy(), sizes(data=8))


@pytest.mark.parametrize(
    ("batch", "strategy", "message"),
    [
        ({"n": shape()}, Strategy(), "no array with a batch dim"),
        ({}, Strategy(), "no array with a batch dim"),
        (
            {"a": shape(8), "b": shape(16)},
            Strategy(num_microbatches=2),
            "splits dim 0 of every array, but they differ: a: 8, b: 16",
        ),
        ({"a": shape(8)}, Strategy(rules={"batch/*": (None, "data")}), "2 entries for shape"),
    ],
)
def test_batches_that_cannot_be_split(batch, strategy, message):
    with pytest.raises(BatchError, match=message):
        batch_specs(batch, strategy, sizes(data=2))


# -- annotations of Linen and NNX, through a whole plan ------------------------------------------


class LinenAnnotated(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(32, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")))(x)
        return nn.Dense(8, kernel_init=nn.with_partitioning(init, ("tensor", None)))(x)


class NnxAnnotated(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        up = nnx.with_partitioning(init, ("embed", "mlp"))
        down = nnx.with_partitioning(init, ("tensor", None))
        self.up = nnx.Linear(16, 32, kernel_init=up, rngs=rngs)
        self.down = nnx.Linear(32, 8, kernel_init=down, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x))


@pytest.mark.parametrize(
    ("model", "up", "down"),
    [
        (LinenAnnotated(), "Dense_0/kernel", "Dense_1/kernel"),
        (NnxAnnotated, "up/kernel", "down/kernel"),
        (lambda rngs: NnxAnnotated(rngs), "up/kernel", "down/kernel"),
    ],
    ids=["linen", "nnx-class", "nnx-factory"],
)
def test_annotations_become_specs(devices, model, up, down):
    import shardtrain as st

    batch = {"x": jnp.ones((8, 16))}
    loss = lambda model, batch: st.Mean(jnp.sum(model(batch["x"]) ** 2), 64)
    plan = st.plan(model, loss, optax.adam(1e-3), batch, "data=2,fsdp=2,tensor=2")
    params = leaves_by_path(plan.abstract_state.params)
    assert params[up].sharding.spec == P("fsdp", "tensor")
    assert params[down].sharding.spec == P("tensor", "fsdp")
    assert plan.layout.params[up].logical == ("embed", "mlp")
    state = leaves_by_path(plan.abstract_state.opt_state)
    assert state[f"0/mu/{up}"].sharding.spec == P("fsdp", "tensor")
    table = str(plan.explain())
    assert "embed, mlp" in table
    assert "P('fsdp', 'tensor')" in table
    assert "P('fsdp', 'tensor')" in str(plan.explain(up))
    with pytest.raises(PartitionError, match=f"did you mean '{up}'"):
        plan.explain(up + "s")


# -- optimizer state ----------------------------------------------------------------------------

PARAMS = {
    "embed": {"kernel": shape(64, 32)},
    "norm": {"scale": shape(32)},
    "head": {"kernel": shape(32, 48), "bias": shape(48)},
}
FULL = {
    "embed/kernel": P("fsdp"),
    "norm/scale": P("fsdp"),
    "head/kernel": P(None, "fsdp"),
    "head/bias": P("fsdp"),
}
mask = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
labels = lambda params: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)

OPTIMIZERS = {
    "adam": (optax.adam(1e-3), 8),
    "adamw masked": (optax.adamw(1e-3, mask=mask), 8),
    "lion": (optax.lion(1e-3), 4),
    "momentum": (optax.sgd(1e-3, momentum=0.9), 4),
    "muon": (optax.contrib.muon(1e-3), 6),
    "multi_transform": (
        optax.multi_transform(
            {"matrix": optax.adam(1e-3), "vector": optax.sgd(1e-2, momentum=0.9)}, labels
        ),
        6,
    ),
    "chain": (optax.chain(optax.clip(1.0), optax.adamw(optax.cosine_decay_schedule(1.0, 9))), 8),
    "multi steps": (optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(), 12),
    "injected": (optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), 8),
    "schedule free": (optax.contrib.schedule_free_adamw(1e-3), 8),
    "ema": (optax.chain(optax.sgd(0.1), optax.ema(0.9)), 4),
    "apply if finite": (optax.apply_if_finite(optax.adam(1e-3), 3), 8),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_sharded_like_its_parameter(name):
    optimizer, count = OPTIMIZERS[name]
    plans = partition_tree(PARAMS, Strategy(), sizes(fsdp=4))
    assert {p: plan.full for p, plan in plans.items()} == FULL
    state = jax.eval_shape(optimizer.init, PARAMS)
    shapes = leaves_by_path(state)
    specs = leaves_by_path(optimizer_specs(state, plans, sharded=True))
    sharded = {p: s for p, s in specs.items() if any(s)}
    assert len(sharded) == count
    for path, spec in sharded.items():
        owner = next(p for p in FULL if path.endswith("/" + p))
        assert spec == FULL[owner]
    for path in specs.keys() - sharded.keys():
        assert shapes[path].size <= 3, f"{path} {shapes[path].shape} is replicated"
    whole = leaves_by_path(optimizer_specs(state, plans, sharded=False))
    assert not any(any(s) for s in whole.values())


def test_adafactor_rows_and_columns_keep_their_dims_shards():
    params = {"w": shape(128, 256)}
    plans = partition_tree(params, Strategy(), sizes(fsdp=4))
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    specs = leaves_by_path(optimizer_specs(state, plans, sharded=True))
    shapes = {p: x.shape for p, x in leaves_by_path(state).items()}
    by_shape = {shapes[p]: s for p, s in specs.items()}
    assert by_shape[(128,)] == P(None)
    assert by_shape[(256,)] == P("fsdp")
    assert by_shape[(1,)] == P()


def test_a_history_of_parameters_is_sharded_behind_its_first_dim():
    plans = partition_tree(PARAMS, Strategy(), sizes(fsdp=4))
    state = jax.eval_shape(optax.lbfgs(memory_size=5).init, PARAMS)
    specs = leaves_by_path(optimizer_specs(state, plans, sharded=True))
    assert specs["0/diff_params_memory/head/kernel"] == P(None, None, "fsdp")


def test_parameters_with_the_same_ending_are_not_confused():
    params = {"kernel": shape(8, 4), "decoder": {"kernel": shape(4, 8)}}
    plans = partition_tree(params, Strategy(), sizes(fsdp=4))
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    specs = leaves_by_path(optimizer_specs(state, plans, sharded=True))
    assert specs["0/mu/kernel"] == P("fsdp")
    assert specs["0/mu/decoder/kernel"] == P(None, "fsdp")
