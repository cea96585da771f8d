import pytest

from shardtrain.errors import ModelError
from shardtrain.planner.catalogue import get
from shardtrain.planner.catalogue_describe import describe_parameters
from shardtrain.planner.search import search_layouts


def llama_shapes(layers, d, heads, kv, hd, ff, vocab):
    block = {
        "attn/q/kernel": (d, heads * hd), "attn/k/kernel": (d, kv * hd),
        "attn/v/kernel": (d, kv * hd), "attn/o/kernel": (heads * hd, d),
        "mlp/gate/kernel": (d, ff), "mlp/up/kernel": (d, ff), "mlp/down/kernel": (ff, d),
        "norm1/scale": (d,), "norm2/scale": (d,),
    }  # fmt: skip
    shapes = {f"layers_{i}/{k}": v for i in range(layers) for k, v in block.items()}
    return shapes | {"embed": (vocab, d), "head": (d, vocab), "norm/scale": (d,)}


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "llama3-70b"])
def test_llama_is_recovered_from_its_shapes(name):
    known = get(name)
    found = describe_parameters(
        llama_shapes(known.layers, known.d_model, known.n_heads, known.n_kv_heads, 128,
                     known.d_ff, known.vocab)
    )  # fmt: skip
    assert found.params == known.params
    for field in ("layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab", "mlp_matrices"):
        assert getattr(found, field) == getattr(known, field), field
    assert found.flops_per_token(4096) == known.flops_per_token(4096)


def test_stacked_layers_and_split_heads():
    shapes = {
        "blocks/attn/q": (12, 256, 4, 64), "blocks/attn/k": (12, 256, 4, 64),
        "blocks/attn/v": (12, 256, 4, 64), "blocks/attn/o": (12, 256, 256),
        "blocks/mlp/up": (12, 256, 1024), "blocks/mlp/down": (12, 1024, 256),
        "blocks/norm": (12, 256), "embed": (5000, 256),
    }  # fmt: skip
    found = describe_parameters(shapes)
    assert (found.layers, found.d_model, found.n_heads, found.head_dim) == (12, 256, 4, 64)
    assert (found.d_ff, found.mlp_matrices, found.tied) == (1024, 2, True)


def test_mixture():
    shapes = llama_shapes(8, 512, 8, 8, 64, 2048, 1000)
    shapes = {k: v for k, v in shapes.items() if "mlp" not in k}
    for i in range(8):
        shapes |= {
            f"layers_{i}/moe/gate": (16, 512, 1024), f"layers_{i}/moe/up": (16, 512, 1024),
            f"layers_{i}/moe/down": (16, 1024, 512), f"layers_{i}/router": (512, 16),
        }  # fmt: skip
    found = describe_parameters(shapes, head_dim=64)
    assert (found.experts, found.expert_ff, found.top_k, found.moe_count) == (16, 1024, 2, 8)
    assert found.active_params < 0.4 * found.params


def test_found_model_can_be_searched():
    model = describe_parameters(llama_shapes(32, 4096, 32, 8, 128, 14336, 128256))
    ours = search_layouts(model, "h100:1x8", 64, 8192).best
    known = search_layouts("llama3-8b", "h100:1x8", 64, 8192).best
    assert ours.strategy == known.strategy
    assert ours.step_time == pytest.approx(known.step_time, rel=1e-6)


def test_no_transformer():
    with pytest.raises(ModelError, match="no repeated block among 2"):
        describe_parameters({"a": (3, 4), "b": (4,)})
