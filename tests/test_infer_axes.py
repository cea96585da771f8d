"""`infer_axes`: the logical axes found in models nobody prepared."""

import jax
import jax.numpy as jnp
import pytest
from infer_zoo import ZOO, gpt, llama, spec, zoo_table

from shardtrain.partitioning.infer.atoms import Atoms
from shardtrain.partitioning.infer.table import infer_axes


def axes(table, path):
    return [" * ".join(names) for names in table.row(path).axes]


@pytest.fixture(scope="module")
def tables():
    return {name: zoo_table(name) for name in ZOO}


EXPECTED = {
    "gpt": {
        "wte/embedding": ["vocab", "embed"],
        "wpe/embedding": ["position", "embed"],
        "h_0/c_attn/kernel": ["embed", "fused_heads"],
        "h_1/c_proj/kernel": ["heads * head_dim", "embed"],
        "h_1/c_fc/kernel": ["embed", "mlp"],
        "h_1/mlp_proj/kernel": ["mlp", "embed"],
        "": ["batch", "sequence"],
    },
    "llama": {
        "embed/embedding": ["vocab", "embed"],
        "layers/0/q/kernel": ["embed", "kv_heads * q_per_kv * head_dim"],
        "layers/0/k/kernel": ["embed", "kv_heads * head_dim"],
        "layers/1/v/kernel": ["embed", "kv_heads * head_dim"],
        "layers/1/o/kernel": ["kv_heads * q_per_kv * head_dim", "embed"],
        "layers/1/gate/kernel": ["embed", "mlp"],
        "layers/1/down/kernel": ["mlp", "embed"],
        "layers/0/norm1/scale": ["embed"],
        "lm_head/kernel": ["embed", "vocab"],
    },
    "llama_scanned": {
        "layers/q/kernel": ["layers", "embed", "kv_heads * q_per_kv * head_dim"],
        "layers/down/kernel": ["layers", "mlp", "embed"],
        "layers/norm2/scale": ["layers", "embed"],
    },
    "linen_scanned": {
        "layers/attention/query/kernel": ["layers", "embed", "heads", "head_dim"],
        "layers/attention/out/kernel": ["layers", "heads", "head_dim", "embed"],
        "layers/up/bias": ["layers", "mlp"],
    },
    "vit": {
        "patches/kernel": ["height", "width", "channels", "embed"],
        "positions": ["", "sequence", "embed"],
        "attention_0/value/kernel": ["embed", "heads", "head_dim"],
        "up_1/kernel": ["embed", "mlp"],
        "head/kernel": ["embed", "classes"],
        "0": ["batch", "height", "width", "channels"],
        "1": ["batch"],
    },
    "t5": {
        "shared/embedding": ["vocab", "embed"],
        "decoder_1_cross/MultiHeadDotProductAttention_0/key/kernel": ["embed", "heads", "head_dim"],
        "encoder_0_wi/kernel": ["embed", "mlp"],
        "lm_head/kernel": ["embed", "vocab"],
        "1": ["batch", "sequence"],
    },
    "mlp": {"layers/0/kernel": ["features", "mlp"], "layers/2/kernel": ["mlp_2", "classes"]},
    "mixer": {
        "token_up_0/kernel": ["height * width", "mlp"],
        "channel_down_1/kernel": ["mlp", "embed"],
    },
    "vae": {"encoder/kernel": ["features", "mlp"], "out/kernel": ["mlp", "features"]},
    "moe": {
        "w_in": ["expert", "embed", "mlp"],
        "w_out": ["expert", "mlp", "embed"],
        "router/kernel": ["embed", "router"],
    },
    "moe_ragged": {"w_in": ["expert", "embed", "mlp"], "w_out": ["expert", "mlp", "embed"]},
    "gshard": {
        "w_in": ["expert", "embed", "mlp"],
        "w_out": ["expert", "mlp", "embed"],
        "router/kernel": ["embed", "expert"],
    },
    "fused": {
        "qkv/kernel": ["embed", "fused_kv_heads"],
        "o/kernel": ["kv_heads * q_per_kv * head_dim", "embed"],
        "gate_up/kernel": ["embed", "fused_mlp"],
        "down/kernel": ["mlp", "embed"],
    },
    "repeated_keys": {
        "positions/embedding": ["position", "embed"],
        "q/kernel": ["embed", "kv_heads * q_per_kv", "head_dim"],
        "k/kernel": ["embed", "kv_heads", "head_dim"],
        "o/kernel": ["kv_heads * q_per_kv", "head_dim", "embed"],
    },
    "lstm": {"embed/embedding": ["vocab", "embed"], "": ["batch", "sequence"]},
}


@pytest.mark.parametrize("model", EXPECTED)
def test_names(tables, model):
    found = {path: axes(tables[model], path) for path in EXPECTED[model]}
    assert found == EXPECTED[model]


def test_every_dim_of_every_model_has_a_name_and_no_primitive_is_unknown(tables):
    for name, table in tables.items():
        assert table.opaque == (), name
        for row in (*table.rows, *table.inputs):
            for size, names, classes in zip(row.shape, row.axes, row.classes, strict=True):
                product = 1
                for c in classes:
                    product *= table.size(c)
                assert product == size, (name, row)
                assert len(names) == len(classes)


def test_two_axes_of_one_parameter_never_share_a_name(tables):
    for table in tables.values():
        for row in table.rows:
            pairs = {
                (n, c)
                for names, classes in zip(row.axes, row.classes, strict=True)
                for n, c in zip(names, classes, strict=True)
            }
            assert len({n for n, _ in pairs}) == len({c for _, c in pairs}), row


def test_why_names_partners_and_lines(tables):
    text = tables["llama"].why("layers/0/up/kernel")
    assert "dim 1 mlp:" in text
    assert "layers/0/down/kernel dim 0, by" in text
    assert "infer_zoo.py:" in text
    with pytest.raises(KeyError):
        tables["llama"].why("layers/0/nothing")


def test_unrolled_layers_have_their_own_hidden_axis_and_share_the_residual_stream(tables):
    table = tables["llama"]
    up = [table.row(f"layers/{i}/up/kernel").classes for i in (0, 1)]
    assert up[0][0] == up[1][0]
    assert up[0][1] != up[1][1]


def test_an_unknown_primitive_is_opaque():
    def fn(w, x):
        h = x @ w["a"]
        h = jax.pure_callback(lambda y: y, spec(8, 16), h)
        return (h @ w["b"]).sum()

    params = {"a": spec(4, 16), "b": spec(16, 4)}
    table = infer_axes(fn, params, spec(8, 4), grad=False)
    assert [o.primitive for o in table.opaque] == ["pure_callback"]
    assert "test_infer_axes.py:" in table.opaque[0].source
    assert table.row("a").classes[1] != table.row("b").classes[0]


def test_known_code_between_ties_what_an_unknown_primitive_does_not():
    def fn(w, x):
        return (jnp.tanh(x @ w["a"]) @ w["b"]).sum()

    params = {"a": spec(4, 16), "b": spec(16, 4)}
    table = infer_axes(fn, params, spec(8, 4), grad=False)
    assert table.row("a").classes[1] == table.row("b").classes[0]


def test_nothing_is_allocated_for_an_eight_billion_parameter_model():
    fn, params, inputs = llama(
        scan=True, ids=spec(4, 2048, dtype="int32"), d=4096, heads=32, kv_heads=8, hidden=14336,
        vocab=128256, layers=48,
    )  # fmt: skip
    before = {id(x) for x in jax.live_arrays()}
    table = infer_axes(fn, params, *inputs)
    # Arrays of earlier tests may be collected meanwhile; none may come.
    assert not [x.shape for x in jax.live_arrays() if id(x) not in before and x.nbytes > 1024]
    assert sum(row.bytes for row in table.rows) > 40e9


def test_work_grows_linearly_with_unrolled_layers():
    """Atoms and equations of the graph, not seconds."""
    sizes = []
    for layers in (2, 4, 6):
        table = infer_axes(*_flat(llama(layers=layers)))
        sizes.append((len(table.graph.atoms.size), len(table.graph.arrays)))
    assert sizes[2][0] - sizes[1][0] == sizes[1][0] - sizes[0][0]
    assert sizes[2][1] - sizes[1][1] == sizes[1][1] - sizes[0][1]


def _flat(made):
    fn, params, inputs = made
    return fn, params, *inputs


def test_a_fused_dim_split_by_a_reshape_refines_into_factors():
    def fn(w, x):
        q, k, v = jnp.moveaxis((x @ w["qkv"]).reshape(4, 6, 3, 2, 8), 2, 0)
        y = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)), v)
        return (y.reshape(4, 6, 16) @ w["out"]).sum()

    table = infer_axes(fn, {"qkv": spec(16, 48), "out": spec(16, 16)}, spec(4, 6, 16))
    assert len(table.row("qkv").classes[1]) == 3
    assert axes(table, "out")[0] == "heads * head_dim"
    assert axes(table, "qkv")[1].split(" * ")[1:] == ["heads", "head_dim"]


def test_vocab_of_an_untied_head_is_its_own_axis_but_shares_the_name():
    table = infer_axes(*_flat(llama()))
    assert axes(table, "lm_head/kernel")[1] == axes(table, "embed/embedding")[0] == "vocab"
    assert table.row("lm_head/kernel").classes[1] != table.row("embed/embedding").classes[0]
    tied = infer_axes(*_flat(gpt()))
    assert axes(tied, "wte/embedding") == ["vocab", "embed"]


def test_atoms_refine_everywhere_at_once():
    atoms = Atoms()
    one, two = atoms.fresh(12), atoms.fresh(12)
    assert atoms.unify(one, two, None, "")
    (out, lost) = atoms.divide([one], (3, 4), None, "")
    assert lost == []
    assert [atoms.roots(d) for d in out] == [(atoms.roots(two)[0],), (atoms.roots(two)[1],)]
    assert [atoms.size[r] for r in atoms.roots(two)] == [3, 4]


def test_atoms_without_a_common_refinement_are_left_alone():
    atoms = Atoms()
    one, two = [*atoms.fresh(2), *atoms.fresh(3)], [*atoms.fresh(3), *atoms.fresh(2)]
    assert not atoms.unify(one, two, None, "")
    assert [atoms.size[r] for r in atoms.roots([*one, *two])] == [2, 3, 3, 2]
    _, lost = atoms.divide([one[:1], one[1:]], (3, 2), None, "")
    assert lost
