import pytest

from shardtrain.errors import ModelError
from shardtrain.planner.catalogue import CATALOGUE, get, variant

# Published totals: model cards, config.json checkpoints' sum of tensor sizes, papers.
EXACT = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "deepseek-v3": 671_026_419_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
}


@pytest.mark.parametrize(("name", "published"), EXACT.items())
def test_published_count_to_the_digit(name, published):
    assert get(name).params == published


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt3-175b", 174.6),  # arXiv:2005.14165 Table 2.1 prints 175.0
        ("kimi-k2", 1026.4),
        ("nemotron-3-nano", 31.58),
        ("nemotron-3-super", 120.7),
        ("llama4-scout-17b-16e", 107.8),
        ("llama4-maverick-17b-128e", 400.7),
        ("nemotron-4-340b", 341.0),
        ("vit-g", 1.011),  # arXiv:2106.04560 Table 2: 1011M and 1843M
        ("vit-G", 1.843),
    ],
)
def test_published_count_as_printed(name, billions):
    assert get(name).params / 1e9 == pytest.approx(billions, rel=6e-4)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9),
        ("deepseek-v3", 37.6),
        ("kimi-k2", 32.9),
        ("qwen3-235b-a22b", 22.2),
        ("qwen3-30b-a3b", 3.35),
        ("gpt-oss-120b", 5.75),
        ("llama4-scout-17b-16e", 17.2),
    ],
)
def test_active_parameters(name, billions):
    assert get(name).active_params / 1e9 == pytest.approx(billions, rel=5e-3)


def test_flops_per_token_of_printed_runs():
    # Megatron-Bridge prints 2403 TFLOP/s at 952 tokens/s for Llama 3.1 405B at 8k: 2524 GFLOP.
    assert get("llama3-405b").flops_per_token(8192) == pytest.approx(2403e12 / 952, rel=2e-3)
    assert get("llama3-70b").flops_per_token(8192) == pytest.approx(2348e12 / 5248, rel=5e-3)
    # DeepSeek-V3 without MTP, 607.53 TFLOP/s at 2425.75 tokens/s (MaxText, causal).
    assert get("deepseek-v3").flops_per_token(4096) == pytest.approx(607.53e12 / 2425.75, rel=2e-3)
    assert get("qwen3-235b-a22b").flops_per_token(4096) == pytest.approx(1029e12 / 6944, rel=2e-3)
    assert get("gpt2-124m").flops_per_token(1024, causal=False) == pytest.approx(
        6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024, rel=2e-3
    )


def test_aliases_and_errors():
    assert get("llama3.1-405b") is get("llama3-405b")
    assert get("GPT2-XL").name == "gpt2-1.5b"
    with pytest.raises(ModelError, match="did you mean 'llama3-8b'"):
        get("lama3-8b")


def test_variant_changes_one_thing():
    padded = variant("gpt2-124m", vocab=50304)
    assert padded.params - get("gpt2-124m").params == (50304 - 50257) * 768


def test_every_entry_has_a_source():
    assert all(model.source for model in CATALOGUE.values())
