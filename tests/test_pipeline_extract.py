"""The stage split finds the repeated block of models written without any thought of pipelines."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pipeline_models import BATCH, LinenModel, NnxModel, abstract_batch, loss, make_batch, setup

from shardtrain.errors import StageSplitError
from shardtrain.modules import standardize
from shardtrain.modules.intercept import Calls, cast_floating
from shardtrain.pipeline import make_pipeline, make_schedule
from shardtrain.pipeline.extract import extract
from shardtrain.pipeline.stages import from_stage_major, stage_layout, to_stage_major
from shardtrain.pytree import leaves_by_path


def run_in_order(model, params, variables, batch, key):
    """The extracted pieces, one layer after the other, without any pipeline."""
    params, variables = leaves_by_path(params), leaves_by_path(variables)
    outer = [
        *(params[p] for p in model.outer_params),
        *(variables[p] for p in model.outer_variables),
        *jax.tree.leaves(batch),
        key,
    ]
    own = lambda leaf, tree, n: tree[leaf.paths[0]][n] if leaf.stacked else tree[leaf.paths[n]]
    carry, sides = model.pre(*outer), model.sides(*outer)
    reports = []
    for n in range(model.count):
        out = model.block(
            *(own(leaf, params, n) for leaf in model.params),
            *(own(leaf, variables, n) for leaf in model.states),
            *(x[n] for x in sides[model.num_shared :]),
            *sides[: model.num_shared],
            *carry,
        )
        carry = out[: len(carry)]
        reports.append(out[len(carry) + len(model.states) :])
    return model.post(*outer, *carry, *(jnp.stack(x) for x in zip(*reports, strict=True)))


CASES = {
    "linen loop": (lambda: LinenModel("loop"), "4 blocks at layer_*", 6, 0),
    "linen remat": (lambda: LinenModel("remat"), "4 blocks at layer_*", 6, 0),
    "linen own rate per layer": (lambda: LinenModel("rates"), "4 blocks at layer_*", 6, 0),
    "linen scan": (lambda: LinenModel("scan"), "4 scanned layers", 6, 0),
    "linen scan of remat": (lambda: LinenModel("scan remat"), "4 scanned layers", 6, 0),
    "nnx list": (lambda: lambda rngs: NnxModel(rngs, "plain"), "4 blocks at blocks/*", 2, 0),
    "nnx remat": (lambda: lambda rngs: NnxModel(rngs, "remat"), "4 blocks at blocks/*", 2, 0),
    "nnx batch norm": (lambda: lambda rngs: NnxModel(rngs, "norm"), "4 blocks at blocks/*", 3, 2),
    "nnx running loss": (lambda: lambda rngs: NnxModel(rngs, "aux"), "4 blocks at blocks/*", 2, 0),
    "nnx loss per layer": (lambda: lambda r: NnxModel(r, "aux list"), "4 blocks at blocks/*", 2, 0),
    "nnx scan": (lambda: lambda rngs: NnxModel(rngs, "scan"), "4 scanned layers", 2, 1),
    "alternating": (
        lambda: LinenModel("alternating"),
        "4 blocks at layer_*, 2 consecutive ones repeat together",
        12,
        0,
    ),
    "five layers": (
        lambda: LinenModel("loop", 5),
        "5 blocks at layer_*; the first 1 run before the pipeline, on every stage",
        6,
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_pieces_compute_the_same_loss(name):
    make, note, num_params, num_states = CASES[name]
    form, make_loss, params, variables = setup(make())
    model = extract(make_loss, loss, form, BATCH, num_chunks=2)
    assert model.note == note
    assert (len(model.params), len(model.states)) == (num_params, num_states)
    batch, key = make_batch(4), jax.random.key(3)
    expected, _ = make_loss(loss)(params, variables, batch, key)
    found = run_in_order(model, params, variables, batch, key)
    np.testing.assert_allclose(found[:4], jax.tree.leaves(expected), rtol=1e-6)


def test_stage_major_and_back():
    form, make_loss, params, _ = setup(LinenModel("loop", 8))
    model = extract(make_loss, loss, form, BATCH, num_chunks=4)
    layout = stage_layout(params, model.params, model.count, 2, 2)
    major = to_stage_major(params, layout)
    bias = major.blocks["layer_*/Dense_0/bias"]
    assert bias.shape == (2, 2, 2, 16)
    for stage, virtual, layer, where in [(0, 0, 1, 1), (1, 0, 0, 2), (0, 1, 0, 4), (1, 1, 1, 7)]:
        expected = params[f"layer_{where}"]["Dense_0"]["bias"]
        np.testing.assert_array_equal(bias[stage, virtual, layer], expected)
    jax.tree.map(np.testing.assert_array_equal, from_stage_major(major, layout), params)
    assert list(major.outer) == ["Embed_0/embedding"]


class Skips(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 8)(tokens)
        seen = []
        for n in range(4):
            x = nn.Dense(8, name=f"layer_{n}")(x + sum(seen[:-1]))
            seen.append(x)
        return nn.Dense(16)(x)


class Pyramid(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 8)(tokens)
        for n in range(4):
            x = nn.Dense(8 * 2 ** (n + 1), name=f"layer_{n}")(x)
        return nn.Dense(16)(x)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(16, name="head")(nn.Embed(16, 8, name="embed")(tokens))


class HiddenStates(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x, seen = nn.Embed(16, 8)(tokens), []
        for n in range(4):
            x = nn.tanh(nn.Dense(8, name=f"layer_{n}")(x))
            seen.append(x)
        return nn.Dense(16)(jnp.concatenate(seen, axis=-1))


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(4)])
        self.head = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(nnx.relu(layer(x)))
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "chunks", "message"),
    [
        (Skips(), 2, r"layer_\* \(4 modules\): .*(differs from block 0|has .* operations)"),
        (
            Pyramid(),
            2,
            r"dot_general with operands \(float32\[4,6,16\], float32\[16,32\]\) instead",
        ),
        (Flat(), 2, r"no scan over stacked parameters\nUse a number of stages that divides"),
        (HiddenStates(), 2, r"float32\[4,6,8\] of 3 blocks is read after the last block"),
        (Twice, 2, r"layers/\* \(4 modules\): a block is called twice"),
        (LinenModel("loop"), 8, r"4 blocks are fewer than 8 stages"),
        (LinenModel("scan"), 8, r"4 scanned layers are not divisible by 8 stages"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(model, chunks, message):
    form, make_loss, _, _ = setup(model)
    with pytest.raises(StageSplitError, match=message):
        extract(make_loss, loss, form, BATCH, num_chunks=chunks)


def test_a_user_can_point_at_the_block():
    form, make_loss, _, _ = setup(LinenModel("loop"))
    model = extract(make_loss, loss, form, BATCH, num_chunks=2, block="layer_*")
    assert model.count == 4
    with pytest.raises(StageSplitError, match=r"no repeated block at 'blocks'.* layer_\*"):
        extract(make_loss, loss, form, BATCH, num_chunks=2, block="blocks")


@pytest.mark.parametrize("model", [lambda r: NnxModel(r, "plain"), lambda r: NnxModel(r, "scan")])
def test_mixed_precision_keeps_the_blocks_own_parameters(model):
    form, _, _, _ = setup(model)
    half = Calls(compute_dtype=jnp.bfloat16)

    def make_loss(user_loss):
        def pure(params, variables, batch, key):
            params = cast_floating(params, jnp.bfloat16)
            out, new = form.apply(user_loss, params, variables, key, True, (batch,), half)
            return standardize(out, 2, False)[0], new

        return pure

    pipeline = make_pipeline(form, make_loss, loss, abstract_batch(8), make_schedule("1f1b", 2, 2))
    assert len(pipeline.model.params) == 2
    assert set(pipeline.model.param_dtypes) == {jnp.dtype("bfloat16")}
    assert pipeline.form.abstract_params.blocks.keys() == {
        leaf.name for leaf in pipeline.model.params
    }
    major = jax.eval_shape(pipeline.form.init, jax.random.key(0))[0]
    assert {x.shape[:3] for x in major.blocks.values()} == {(2, 1, 2)}
    assert {x.dtype for x in major.blocks.values()} == {jnp.dtype("float32")}


def test_the_stage_major_form_is_the_same_model():
    form, make_loss, params, variables = setup(lambda rngs: NnxModel(rngs, "norm"))
    pipeline = make_pipeline(form, make_loss, loss, abstract_batch(8), make_schedule("1f1b", 4, 2))
    major = to_stage_major(params, pipeline.params), to_stage_major(variables, pipeline.variables)
    total = lambda model, batch: loss(model, batch)[0].total
    args = (jax.random.key(0), True, (make_batch(4),), Calls())
    found, new = pipeline.form.apply(total, *major, *args)
    expected, expected_new = form.apply(total, params, variables, *args)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    back = from_stage_major(new, pipeline.variables)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, back["blocks"], expected_new["blocks"])
