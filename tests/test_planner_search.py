"""Golden winners: the layout that wins for configurations that others have published."""

import pytest

from shardtrain.planner.catalogue import get
from shardtrain.planner.search import search_layouts
from shardtrain.planner.search_space import Space, layer_counts

# model, hardware, global batch, sequence; axes above 1 of the winner; its remat and leading term
GOLDEN = [
    ("llama2-7b", "h100:1x8", 32, 4096, {"fsdp": 8}, "none", "matmul"),
    ("llama2-7b", "v5p:4x8x8", 1024, 4096, {"fsdp": 256}, "none", "matmul"),
    ("llama2-7b", "a100:16x8", 256, 4096, {"fsdp": 128}, "none", "matmul"),
    ("llama3-8b", "h100:8x8", 512, 8192, {"fsdp": 64}, "none", "matmul"),
    ("llama3-70b", "h200:32x8", 512, 8192, {"fsdp": 64, "pipeline": 2, "tensor": 2}, "none",
     "matmul"),
    # the Llama 3 paper trained at tensor 8, pipeline 16 (arXiv:2407.21783 table 4)
    ("llama3-405b", "h100:64x8", 512, 8192,
     {"fsdp": 2, "pipeline": 16, "context": 2, "tensor": 8}, "none", "matmul"),
    ("llama3-405b", "gb300:64x4", 1536, 8192, {"fsdp": 32, "context": 2, "tensor": 4}, "none",
     "matmul"),
    ("gpt3-175b", "a100:48x8", 1536, 2048, {"fsdp": 6, "pipeline": 16, "tensor": 4}, "none",
     "matmul"),
    ("gpt2-124m", "a100:1x8", 512, 1024, {"fsdp": 8}, "none", "matmul"),
    ("deepseek-v3", "gb300:64x4", 4096, 4096, {"fsdp": 4, "expert": 64}, "none", "matmul"),
]  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case[0]}-{case[1]}")
def test_golden_winner(case):
    model, machine, batch, sequence, axes, remat, leading = case
    found = search_layouts(model, machine, batch, sequence)
    best = found.best
    sizes = {name: size for name, size in best.strategy.sizes.items() if size > 1}
    assert sizes == axes
    assert best.strategy.remat == remat
    assert best.reason.startswith(f"fastest: {leading}")
    assert best.memory.total <= found.hardware.chip.memory
    loser = max(found.ranked, key=lambda one: one.step_time)
    assert "slower" in loser.reason
    assert "+" in loser.reason


def test_embedding_and_output_may_count_as_layers():
    space = Space(tensor=(8,), zero=(1,), remat=("full",), context=(1,))
    found = search_layouts("llama3-405b", "h100:64x8", 512, 8192, space)
    counts = layer_counts(get("llama3-405b"))
    assert counts == (126, 127, 128)
    assert layer_counts(get("llama3-405b"), even=True) == (126,)
    for one in found.ranked[::20]:
        stages = one.strategy.pipeline * one.strategy.virtual_stages
        assert any(count % stages == 0 for count in counts)
