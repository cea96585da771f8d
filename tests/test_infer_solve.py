"""`solve`: Megatron's layout found, not given; and what cannot be sharded is said."""

import jax
import jax.numpy as jnp
import pytest
from infer_zoo import ZOO, gpt, llama, spec, zoo_table
from jax.sharding import PartitionSpec as P

from shardtrain.errors import IndivisibleError, PartitionError
from shardtrain.partitioning.infer.costs import wildcard
from shardtrain.partitioning.infer.solve import solve
from shardtrain.partitioning.infer.table import infer_axes


def table_of(made):
    fn, params, inputs = made
    return infer_axes(fn, params, *inputs)


@pytest.fixture(scope="module")
def tables():
    return {name: zoo_table(name) for name in ZOO}


def layers_of(specs):
    """Specs by wildcarded path; all layers must agree."""
    out = {}
    for path, spec_ in specs.items():
        assert out.setdefault(wildcard(path), spec_) == spec_, path
    return out


COLUMN, ROW, WHOLE = P(None, "tensor"), P("tensor"), P()
MEGATRON = {
    "gpt": {
        "wte/embedding": ROW,
        "wpe/embedding": WHOLE,
        "h_*/c_attn/kernel": COLUMN,
        "h_*/c_attn/bias": ROW,
        "h_*/c_proj/kernel": ROW,
        "h_*/c_proj/bias": WHOLE,
        "h_*/c_fc/kernel": COLUMN,
        "h_*/mlp_proj/kernel": ROW,
        "h_*/LayerNorm_0/scale": WHOLE,
    },
    "llama": {
        "embed/embedding": ROW,
        "lm_head/kernel": COLUMN,
        "layers/*/q/kernel": COLUMN,
        "layers/*/k/kernel": COLUMN,
        "layers/*/v/kernel": COLUMN,
        "layers/*/o/kernel": ROW,
        "layers/*/gate/kernel": COLUMN,
        "layers/*/up/kernel": COLUMN,
        "layers/*/down/kernel": ROW,
        "layers/*/norm1/scale": WHOLE,
    },
    "llama_scanned": {
        "embed/embedding": ROW,
        "lm_head/kernel": COLUMN,
        "layers/q/kernel": P(None, None, "tensor"),
        "layers/k/kernel": P(None, None, "tensor"),
        "layers/o/kernel": P(None, "tensor"),
        "layers/up/kernel": P(None, None, "tensor"),
        "layers/down/kernel": P(None, "tensor"),
    },
    "linen_scanned": {
        "layers/attention/query/kernel": P(None, None, "tensor"),
        "layers/attention/out/kernel": P(None, "tensor"),
        "layers/up/kernel": P(None, None, "tensor"),
        "layers/up/bias": P(None, "tensor"),
        "layers/down/kernel": P(None, "tensor"),
        "lm_head/kernel": COLUMN,
    },
    "vit": {
        "attention_*/query/kernel": COLUMN,
        "attention_*/key/bias": ROW,
        "attention_*/out/kernel": ROW,
        "up_*/kernel": COLUMN,
        "down_*/kernel": ROW,
        "patches/kernel": WHOLE,
        "head/kernel": COLUMN,
    },
    "t5": {
        "shared/embedding": ROW,
        "encoder_*_attention/MultiHeadDotProductAttention_0/query/kernel": COLUMN,
        "decoder_*_cross/MultiHeadDotProductAttention_0/key/kernel": COLUMN,
        "decoder_*_cross/MultiHeadDotProductAttention_0/out/kernel": ROW,
        "encoder_*_wi/kernel": COLUMN,
        "decoder_*_wo/kernel": ROW,
        "lm_head/kernel": COLUMN,
    },
    "mixer": {
        "token_up_*/kernel": COLUMN,
        "token_down_*/kernel": ROW,
        "channel_up_*/kernel": COLUMN,
        "channel_down_*/kernel": ROW,
    },
    "vae": {
        "encoder/kernel": COLUMN,
        "mean/kernel": ROW,
        "log_var/kernel": ROW,
        "decoder/kernel": COLUMN,
        "out/kernel": ROW,
    },
    "moe_ragged": {"w_in": P(None, None, "tensor"), "w_out": P(None, "tensor")},
    "moe": {"w_in": ROW, "w_out": ROW, "router/kernel": WHOLE},
    "gshard": {"w_in": ROW, "w_out": ROW},
    "fused": {
        "qkv/kernel": COLUMN,
        "o/kernel": ROW,
        "gate_up/kernel": COLUMN,
        "down/kernel": ROW,
        "lm_head/kernel": COLUMN,
    },
    "repeated_keys": {
        "q/kernel": COLUMN,
        "k/kernel": COLUMN,
        "v/bias": ROW,
        "o/kernel": ROW,
        "positions/embedding": WHOLE,
    },
    "lstm": {"embed/embedding": ROW, "lm_head/kernel": COLUMN},
}


@pytest.mark.parametrize("model", MEGATRON)
@pytest.mark.parametrize("tensor", [2, 4])
def test_megatron_pairs_are_found(tables, model, tensor):
    specs = layers_of(solve(tables[model], {"data": 2, "tensor": tensor}).specs)
    assert {path: specs[path] for path in MEGATRON[model]} == MEGATRON[model]


@pytest.mark.parametrize("model", MEGATRON)
def test_every_sharded_dim_divides_and_no_axis_is_used_twice(tables, model):
    solution = solve(tables[model], {"tensor": 4})
    for row in tables[model].rows:
        entries = tuple(solution.specs[row.path])
        assert entries.count("tensor") <= 1
        for size, entry in zip(row.shape, entries, strict=False):
            assert entry is None or size % 4 == 0
        assert solution.reasons[row.path]


@pytest.mark.parametrize("weight", [0.25, 0.5, 2.0])
def test_transformers_do_not_depend_on_the_weight_of_communication(tables, weight):
    for model in ("gpt", "llama", "llama_scanned", "t5", "vit"):
        table = tables[model]
        assert (
            solve(table, {"tensor": 2}, comm_weight=weight).specs
            == solve(table, {"tensor": 2}).specs
        )


def test_reasons_name_the_partner(tables):
    reasons = solve(tables["llama"], {"tensor": 2}).reasons
    assert (
        "mlp: column-parallel, with layers/*/down/kernel as its row-parallel partner"
        in (reasons["layers/0/up/kernel"])
    )
    assert "row-parallel" in reasons["layers/0/down/kernel"]
    assert "all-reduces" in reasons["layers/0/down/kernel"]
    assert "split by rows of the table" in reasons["embed/embedding"]
    assert reasons["norm/scale"].startswith("whole: embed")


def test_backward_sums_of_parallel_projections_are_merged(tables):
    """Two layers: attention out, mlp down, and one merged sum each in the backward pass."""
    reasons = solve(tables["llama"], {"tensor": 2}).reasons
    assert "cost 4 all-reduces of 65.5 kB" in reasons["layers/0/o/kernel"]
    assert "cost 4 all-reduces of 65.5 kB" in reasons["layers/0/down/kernel"]


def test_fewer_kv_heads_than_tensor_replicates_keys_and_values():
    solution = solve(table_of(llama(kv_heads=2)), {"tensor": 4})
    assert solution.specs["layers/0/q/kernel"] == COLUMN
    assert solution.specs["layers/0/o/kernel"] == ROW
    assert solution.specs["layers/0/k/kernel"] == WHOLE
    assert any("kv_heads=2 < tensor=4" in f for f in solution.findings)
    one = solve(table_of(llama(kv_heads=1)), {"tensor": 4})
    assert one.specs["layers/1/q/kernel"] == COLUMN
    assert one.specs["layers/1/v/kernel"] == WHOLE


def test_sizes_that_do_not_divide_are_findings():
    solution = solve(table_of(gpt(vocab=97, heads=2)), {"tensor": 4})
    assert solution.specs["wte/embedding"] == WHOLE
    assert solution.specs["h_0/c_proj/kernel"] == WHOLE
    assert solution.specs["h_0/c_fc/kernel"] == COLUMN
    assert any(
        f.startswith("vocab has 97 elements, not divisible by tensor=4") for f in solution.findings
    )
    assert any(
        f.startswith("heads has 2 elements, not divisible by tensor=4") for f in solution.findings
    )
    assert "97 is not divisible by tensor=4" in solution.reasons["wte/embedding"]


def test_a_fused_projection_is_reported(tables):
    findings = solve(tables["gpt"], {"tensor": 2}).findings
    assert any("h_*/c_attn/kernel: one dim fuses several projections" in f for f in findings)


def test_convolutions_are_advised_to_use_data(tables):
    solution = solve(tables["conv_net"], {"tensor": 2})
    assert solution.specs["Conv_1/kernel"] == WHOLE
    assert any("tensor=1 with more data or fsdp is better" in f for f in solution.findings)


def test_recurrent_weights_are_not_split(tables):
    solution = solve(tables["lstm"], {"tensor": 2})
    assert all(v == WHOLE for k, v in solution.specs.items() if "Cell" in k)
    assert any("every step of a recurrence" in r for r in solution.reasons.values())


def test_no_tensor_axis_shards_nothing(tables):
    solution = solve(tables["llama"], {"data": 8})
    assert set(solution.specs.values()) == {WHOLE}
    assert solution.predicted_bytes == 0
    assert solution.flops_share == 1


def test_the_expert_axis_takes_the_expert_dim(tables):
    solution = solve(tables["moe"], {"expert": 2, "tensor": 2})
    assert solution.specs["w_in"] == P("expert", None, "tensor")
    assert solution.specs["w_out"] == P("expert", "tensor")
    assert solution.specs["router/kernel"] == WHOLE
    ragged = solve(tables["moe_ragged"], {"expert": 2})
    assert ragged.specs["w_in"] == P("expert")
    none = solve(tables["llama"], {"expert": 2})
    assert "expert=2 shards nothing: the model has no expert axis" in none.findings
    three = solve(tables["moe"], {"expert": 3})
    assert any("do not divide" in f for f in three.findings)


def test_the_context_axis_takes_the_sequence_dims(tables):
    solution = solve(tables["t5"], {"context": 4})
    assert solution.inputs == {"0": P(None, "context"), "1": P(None, "context")}
    assert solve(tables["t5"], {"tensor": 4}).inputs == {"0": P(), "1": P()}
    assert solve(tables["llama"], {"context": 2}).inputs == {"": P(None, "context")}
    whole = solve(tables["llama"], {"context": 2}, fixed={"sequence": None})
    assert whole.inputs == {"": P()}
    odd = solve(tables["t5"], {"context": 8})
    assert odd.inputs == {"0": P(None, "context"), "1": P()}
    assert (
        "input 1: its sequence of 12 is not divisible by context=8 and stays whole" in odd.findings
    )
    assert solve(tables["vit"], {"context": 2}).findings == [
        "context=2 shards nothing: no input has a sequence dim"
    ]


def test_work_divides(tables):
    for model in ("gpt", "llama", "t5", "mixer"):
        assert solve(tables[model], {"tensor": 4}).flops_share < 0.3
    assert solve(tables["llama"], {"tensor": 4}).flops_share == 0.25


def test_fixed_axes_and_paths_win(tables):
    table = tables["llama"]
    no_vocab = solve(table, {"tensor": 2}, fixed={"vocab": None})
    assert no_vocab.specs["embed/embedding"] == WHOLE
    assert no_vocab.specs["layers/0/up/kernel"] == COLUMN
    path = solve(table, {"tensor": 2}, fixed={"layers/*/up/kernel": None})
    assert path.specs["layers/0/up/kernel"] == WHOLE
    assert path.reasons["layers/1/up/kernel"] == "fixed by a rule"
    embed = solve(table, {"tensor": 2}, fixed={"embed": "tensor"})
    assert embed.specs["layers/0/up/kernel"] == ROW
    assert embed.specs["norm/scale"] == ROW


def test_wrong_fixed_axes_are_refused(tables):
    with pytest.raises(PartitionError, match="did you mean 'vocab'"):
        solve(tables["llama"], {"tensor": 2}, fixed={"vocabs": None})
    with pytest.raises(IndivisibleError, match="vocab has 97 elements"):
        solve(table_of(gpt(vocab=97)), {"tensor": 2}, fixed={"vocab": "tensor"})
    with pytest.raises(IndivisibleError, match="expert has 4 elements, not divisible by expert=3"):
        solve(tables["moe"], {"expert": 3}, fixed={"expert": "expert"})
    with pytest.raises(PartitionError, match=r"channels_2 \(.*\) cannot be sharded .*: chan"):
        solve(tables["conv_net"], {"tensor": 2}, fixed={"channels_2": "tensor"})
    with pytest.raises(PartitionError, match=r"sequence \(no parameter has it\) cannot be sharded"):
        solve(tables["llama"], {"tensor": 2}, fixed={"sequence": "tensor"})
    with pytest.raises(PartitionError, match="meet in one array"):
        solve(tables["llama"], {"tensor": 2}, fixed={"vocab": "tensor", "embed": "tensor"})


def test_an_alternative_is_reported(tables):
    solution = solve(tables["llama"], {"tensor": 2})
    assert set(solution.sharded) == {"vocab", "mlp", "kv_heads"}
    assert solution.runner_up
    assert len(solution.runner_up) != 4  # vocab twice, mlp, kv_heads: the chosen one


def test_repeated_dense_layers_alternate():
    """Same-named layers of one stack: column, row, column, row."""

    def fn(w, x):
        for i in range(4):
            x = jax.nn.relu(x @ w[f"dense_{i}"])
        return x.sum()

    params = {f"dense_{i}": spec(32, 32) for i in range(4)}
    specs = solve(table_of((fn, params, (spec(8, 32),))), {"tensor": 2}).specs
    assert [tuple(specs[f"dense_{i}"]) for i in range(4)] in (
        [(None, "tensor"), ("tensor",), (None, "tensor"), ("tensor",)],
        [("tensor",), (None, "tensor"), ("tensor",), (None, "tensor")],
    )


def test_an_albert_style_shared_block_is_not_taken_for_a_recurrence():
    def fn(w, x):
        def block(h, _):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        return jax.lax.scan(block, x, None, length=4)[0].sum()

    params = {"up": spec(16, 64), "down": spec(64, 16)}
    specs = solve(table_of((fn, params, (spec(4, 6, 16),))), {"tensor": 2}).specs
    assert specs == {"down": ROW, "up": COLUMN}


def test_a_scalar_parameter_beside_an_embedding():
    """Two towers and a learnt temperature (CLIP): a parameter without dims has no vocab."""
    params = {
        "embed": jax.ShapeDtypeStruct((32, 16), jnp.float32),
        "image": jax.ShapeDtypeStruct((24, 16), jnp.float32),
        "temperature": jax.ShapeDtypeStruct((), jnp.float32),
    }
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    pixels = jax.ShapeDtypeStruct((8, 24), jnp.float32)

    def loss(params, tokens, pixels):
        text = params["embed"][tokens].mean(1)
        return jnp.sum((pixels @ params["image"]) @ text.T * jnp.exp(params["temperature"]))

    found = solve(infer_axes(loss, params, tokens, pixels), {"tensor": 2})
    assert found.specs["temperature"] == P()
