"""Transformer descriptions with exact parameter counts: enough to plan without the code.

A `Model` is a shape, not a program. Counts follow from it in closed form and reproduce the
published numbers to the digit (tests/test_planner_catalogue.py).
"""

import dataclasses
from dataclasses import dataclass

from shardtrain.errors import ModelError, suggest


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): low-rank q and kv."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Model:
    """A decoder (or encoder) transformer's shape.

    Attributes:
        name: how it is called.
        layers: transformer blocks; of a hybrid, all blocks of any kind.
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        head_dim: width of a head.
        d_ff: hidden width of the dense MLP.
        vocab: rows of the embedding table (classes, for an image model).
        mlp_matrices: 2 (up, down) or 3 (gate, up, down).
        tied: the output matrix is the embedding.
        norm: "rms" (scale) or "layer" (scale and bias).
        bias: linear layers have biases.
        positions: rows of a learned position table.
        qk_norm: each head's query and key are normalised by a learned scale.
        block_norms: norms per block (a hybrid's block has one).
        experts: routed experts per MoE layer, 0 for a dense model.
        top_k: experts each token visits.
        expert_ff: hidden width of one expert.
        shared_ff: hidden width of the experts every token visits.
        moe_layers: blocks whose MLP is a mixture; None: all when there are experts.
        expert_latent: width experts work in, 0 for d_model.
        expert_bias: experts and router have biases.
        router_bias: the router has a bias used for balancing (not trained by gradient).
        sinks: one learned attention sink per head.
        latent: multi-head latent attention, or None.
        window: sliding window length, 0 for full attention.
        window_layers: blocks with the window.
        attention_layers: blocks with attention; None: all.
        mamba_layers: blocks that are Mamba-2 mixers.
        mamba_params: parameters of one of them.
        mtp: extra multi-token-prediction blocks at the end, trained but not counted in `params`.
        patch: parameters of the patch embedding (image models, replaces the token embedding).
        head_bias: the output matrix has a bias.
        exact: the published total when the shape here is only approximate, else 0.
        source: where the shape is published.
    """

    name: str
    layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    mlp_matrices: int = 3
    tied: bool = False
    norm: str = "rms"
    bias: bool = False
    positions: int = 0
    qk_norm: bool = False
    block_norms: int = 2
    experts: int = 0
    top_k: int = 0
    expert_ff: int = 0
    shared_ff: int = 0
    moe_layers: int | None = None
    expert_latent: int = 0
    expert_bias: bool = False
    router_bias: bool = False
    sinks: bool = False
    latent: Latent | None = None
    window: int = 0
    window_layers: int = 0
    attention_layers: int | None = None
    mamba_layers: int = 0
    mamba_params: int = 0
    mtp: int = 0
    patch: int = 0
    head_bias: bool = False
    exact: int = 0
    source: str = ""

    @property
    def moe_count(self) -> int:
        """Blocks with a mixture of experts."""
        if not self.experts:
            return 0
        return self.layers if self.moe_layers is None else self.moe_layers

    @property
    def attention_count(self) -> int:
        """Blocks with attention."""
        return self.layers if self.attention_layers is None else self.attention_layers

    @property
    def dense_count(self) -> int:
        """Blocks with a dense MLP (a hybrid's blocks hold one mixer each)."""
        if self.attention_layers is not None:
            return self.layers - self.attention_count - self.mamba_layers - self.moe_count
        return self.layers - self.moe_count

    @property
    def attention_matmul(self) -> int:
        """Weights of one block's attention matmuls."""
        d, h, hd = self.d_model, self.n_heads, self.head_dim
        if self.latent is None:
            return d * hd * (2 * h + 2 * self.n_kv_heads)
        m = self.latent
        query = d * m.q_rank + m.q_rank * h * (m.nope + m.rope)
        key_value = d * (m.kv_rank + m.rope) + m.kv_rank * h * (m.nope + m.value)
        return query + key_value + h * m.value * d

    @property
    def expert_matmul(self) -> int:
        """Weights of one routed expert."""
        return self.mlp_matrices * (self.expert_latent or self.d_model) * self.expert_ff

    @property
    def shared_matmul(self) -> int:
        """Weights of a mixture block that every token visits: shared experts, router, latent."""
        shared = self.mlp_matrices * self.d_model * self.shared_ff + self.d_model * self.experts
        return shared + 2 * self.d_model * self.expert_latent

    @property
    def dense_matmul(self) -> int:
        """Weights of one dense MLP."""
        return self.mlp_matrices * self.d_model * self.d_ff

    @property
    def embedding(self) -> int:
        """Rows times width of the token table (0 for an image model)."""
        return 0 if self.patch else self.vocab * self.d_model

    @property
    def block_matmul(self) -> int:
        """Matmul weights in all blocks, every expert counted."""
        mixture = self.experts * self.expert_matmul + self.shared_matmul
        return (
            self.attention_count * self.attention_matmul
            + self.dense_count * self.dense_matmul
            + self.moe_count * mixture
            + self.mamba_layers * self.mamba_params
        )

    @property
    def active_block_matmul(self) -> int:
        """Matmul weights in all blocks that one token uses."""
        return self.block_matmul - self.moe_count * (self.experts - self.top_k) * self.expert_matmul

    @property
    def active_matmul(self) -> int:
        """Matmul weights one token uses: blocks and output matrix (the N of 6N)."""
        return self.active_block_matmul + self.vocab * self.d_model

    @property
    def params(self) -> int:
        """All parameters (the published count)."""
        if self.exact:
            return self.exact
        head = 0 if self.tied else self.vocab * self.d_model
        head += self.vocab if self.head_bias else 0
        embedding = self.embedding + self.patch + self.positions * self.d_model
        return self.block_matmul + embedding + head + self._small()

    @property
    def active_params(self) -> int:
        """Parameters one token uses, embeddings counted."""
        return self.params - self.moe_count * (self.experts - self.top_k) * self.expert_matmul

    def _small(self) -> int:
        """Norm scales, biases, sinks."""
        d, h, hd = self.d_model, self.n_heads, self.head_dim
        norm = d * (2 if self.norm == "layer" else 1)
        norms = self.layers * (1 if self.attention_layers is not None else self.block_norms)
        total = (norms + 1) * norm
        attention = 2 * hd if self.qk_norm else 0
        if self.latent is not None:
            attention += self.latent.q_rank + self.latent.kv_rank
        if self.bias:
            attention += hd * (h + 2 * self.n_kv_heads) + d
            total += self.dense_count * ((self.mlp_matrices - 1) * self.d_ff + d)
        attention += h if self.sinks else 0
        mixture = self.experts if self.expert_bias or self.router_bias else 0
        if self.expert_bias:
            mixture += self.experts * ((self.mlp_matrices - 1) * self.expert_ff + d)
        return total + self.attention_count * attention + self.moe_count * mixture

    def attention_width(self) -> tuple[int, int]:
        """(query-key width, value width) of all heads together."""
        if self.latent is not None:
            qk = self.latent.nope + self.latent.rope
            return self.n_heads * qk, self.n_heads * self.latent.value
        return self.n_heads * self.head_dim, self.n_heads * self.head_dim

    def attention_tokens(self, sequence: int, causal: bool = True) -> float:
        """Sum over attention blocks of the mean number of keys a query sees."""
        full = sequence / 2 if causal else sequence
        windowed = min(self.window or sequence, full)
        inside = min(self.window_layers, self.attention_count)
        return (self.attention_count - inside) * full + inside * windowed

    def flops_per_token(self, sequence: int, causal: bool = True) -> float:
        """Model FLOPs of forward and backward for one token (no recomputation).

        6 per active matmul weight, and 6 per query-key and value element of attention.

        Args:
            sequence: tokens in a sequence.
            causal: count only the keys a query may see.

        Example:
            >>> get("llama3.1-405b").flops_per_token(8192) / 1e9  # doctest: +ELLIPSIS
            2523.9...
        """
        qk, value = self.attention_width()
        attention = 6 * (qk + value) * self.attention_tokens(sequence, causal)
        extra = self.mtp * (self.active_block_matmul / self.layers + self.vocab * self.d_model)
        return 6 * (self.active_matmul + extra) + attention


def _gpt(name: str, layers: int, d: int, heads: int, vocab: int = 50257, seq: int = 1024,
         source: str = "openai/gpt-2 hparams") -> Model:  # fmt: skip
    return Model(name, layers, d, heads, heads, d // heads, 4 * d, vocab, 2, True, "layer", True,
                 seq, source=source)  # fmt: skip


def _llama(name: str, layers: int, d: int, heads: int, kv: int, ff: int, vocab: int,
           source: str) -> Model:  # fmt: skip
    return Model(name, layers, d, heads, kv, 128, ff, vocab, source=source)


def _qwen_moe(name: str, layers: int, d: int, heads: int, ff: int) -> Model:
    return Model(name, layers, d, heads, 4, 128, 0, 151936, qk_norm=True, experts=128, top_k=8,
                 expert_ff=ff, source="arXiv:2505.09388 and config.json")  # fmt: skip


def _oss(name: str, layers: int, experts: int) -> Model:
    return Model(name, layers, 2880, 64, 8, 64, 0, 201088, bias=True, sinks=True, experts=experts,
                 top_k=4, expert_ff=2880, expert_bias=True, window=128, window_layers=layers // 2,
                 source="arXiv:2508.10925 and config.json")  # fmt: skip


def _deepseek(name: str, heads: int, experts: int, dense: int, vocab: int, source: str,
              mtp: int = 0) -> Model:  # fmt: skip
    return Model(name, 61, 7168, heads, heads, 128, 18432, vocab, experts=experts, top_k=8,
                 expert_ff=2048, shared_ff=2048, moe_layers=61 - dense, router_bias=True,
                 latent=Latent(1536, 512, 128, 64, 128), mtp=mtp, source=source)  # fmt: skip


def _hybrid(name: str, counts: tuple[int, int, int], d: int, heads: int, experts: int, top_k: int,
            ff: int, shared: int, mamba: int, latent: int, source: str) -> Model:  # fmt: skip
    attention, mixtures, mambas = counts
    return Model(name, sum(counts), d, heads, 2, 128, 0, 131072, 2, experts=experts, top_k=top_k,
                 expert_ff=ff, shared_ff=shared, moe_layers=mixtures, expert_latent=latent,
                 attention_layers=attention, mamba_layers=mambas, mamba_params=mamba,
                 router_bias=True, source=source)  # fmt: skip


def _llama4(name: str, experts: int, mixtures: int) -> Model:
    return Model(name, 48, 5120, 40, 8, 128, 16384, 202048, experts=experts, top_k=1,
                 expert_ff=8192, shared_ff=8192, moe_layers=mixtures, window=8192,
                 window_layers=36, source="meta-llama/llama-models llama4 config")  # fmt: skip


def _vit(name: str, layers: int, d: int, heads: int, ff: int) -> Model:
    return Model(name, layers, d, heads, heads, d // heads, ff, 0, 2, False, "layer", True, 257,
                 patch=14 * 14 * 3 * d + 2 * d, source="arXiv:2106.04560 Table 2")  # fmt: skip


_L2, _L3 = "arXiv:2307.09288 and params.json", "arXiv:2407.21783 Table 3"
_GPT3 = "arXiv:2005.14165 Table 2.1"

_MODELS = (
    _gpt("gpt2-124m", 12, 768, 12),
    _gpt("gpt2-355m", 24, 1024, 16),
    _gpt("gpt2-774m", 36, 1280, 20),
    _gpt("gpt2-1.5b", 48, 1600, 25),
    _gpt("gpt3-1.3b", 24, 2048, 16, seq=2048, source=_GPT3),
    _gpt("gpt3-2.7b", 32, 2560, 32, seq=2048, source=_GPT3),
    _gpt("gpt3-6.7b", 32, 4096, 32, seq=2048, source=_GPT3),
    _gpt("gpt3-13b", 40, 5120, 40, seq=2048, source=_GPT3),
    _gpt("gpt3-175b", 96, 12288, 96, seq=2048, source=_GPT3),
    _llama("llama2-7b", 32, 4096, 32, 32, 11008, 32000, _L2),
    _llama("llama2-13b", 40, 5120, 40, 40, 13824, 32000, _L2),
    _llama("llama2-34b", 48, 8192, 64, 8, 22016, 32000, _L2),
    _llama("llama2-70b", 80, 8192, 64, 8, 28672, 32000, _L2),
    _llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256, _L3),
    _llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256, _L3),
    _llama("llama3-405b", 126, 16384, 128, 8, 53248, 128256, _L3),
    Model("mixtral-8x7b", 32, 4096, 32, 8, 128, 0, 32000, experts=8, top_k=2, expert_ff=14336,
          source="arXiv:2401.04088"),
    Model("mixtral-8x22b", 56, 6144, 48, 8, 128, 0, 32768, experts=8, top_k=2, expert_ff=16384,
          source="mistralai/Mixtral-8x22B-v0.3 config.json"),
    _deepseek("deepseek-v3", 128, 256, 3, 129280, "arXiv:2412.19437 and config.json"),
    _deepseek("kimi-k2", 64, 384, 1, 163840, "moonshotai/Kimi-K2 config.json"),
    _qwen_moe("qwen3-30b-a3b", 48, 2048, 32, 768),
    _qwen_moe("qwen3-235b-a22b", 94, 4096, 64, 1536),
    Model("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True, source="arXiv:2505.09388"),
    Model("qwen3-32b", 64, 5120, 64, 8, 128, 25600, 151936, qk_norm=True,
          source="arXiv:2505.09388"),
    _oss("gpt-oss-20b", 24, 32),
    _oss("gpt-oss-120b", 36, 128),
    _llama4("llama4-scout-17b-16e", 16, 48),
    _llama4("llama4-maverick-17b-128e", 128, 24),
    _hybrid("nemotron-3-nano", (6, 23, 23), 2688, 32, 128, 6, 1856, 3712, 38_707_200, 0,
            "arXiv:2512.20848"),
    _hybrid("nemotron-3-super", (8, 40, 40), 4096, 32, 512, 22, 2688, 5376, 109_576_192, 1024,
            "nvidia/Nemotron-3-Super-120B-A12B config.json"),
    Model("nemotron-4-15b", 32, 6144, 48, 8, 128, 24576, 256000, 2, source="arXiv:2402.16819"),
    Model("nemotron-4-340b", 96, 18432, 96, 8, 192, 73728, 256000, 2, source="arXiv:2406.11704"),
    Model("gemma-2b", 18, 2048, 8, 1, 256, 16384, 256000, tied=True, source="arXiv:2403.08295"),
    Model("gemma-7b", 28, 3072, 16, 16, 256, 24576, 256000, tied=True, source="arXiv:2403.08295"),
    Model("gemma2-9b", 42, 3584, 16, 8, 256, 14336, 256000, tied=True, block_norms=4, window=4096,
          window_layers=21, source="arXiv:2408.00118"),
    Model("gemma2-27b", 46, 4608, 32, 16, 128, 36864, 256000, tied=True, block_norms=4, window=4096,
          window_layers=23, source="arXiv:2408.00118"),
    Model("gemma3-4b", 34, 2560, 8, 4, 256, 10240, 262144, tied=True, block_norms=4,
          qk_norm=True, window=1024,
          window_layers=29, source="arXiv:2503.19786"),
    Model("gemma3-12b", 48, 3840, 16, 8, 256, 15360, 262144, tied=True, block_norms=4,
          qk_norm=True, window=1024,
          window_layers=40, source="arXiv:2503.19786"),
    Model("gemma3-27b", 62, 5376, 32, 16, 128, 21504, 262144, tied=True, block_norms=4,
          qk_norm=True, window=1024, window_layers=52, source="arXiv:2503.19786"),
    _vit("vit-g", 40, 1408, 16, 6144),
    _vit("vit-G", 48, 1664, 16, 8192),
)  # fmt: skip

CATALOGUE = {model.name: model for model in _MODELS}

_ALIASES = {
    "llama3.1-405b": "llama3-405b", "llama3.1-70b": "llama3-70b", "llama3.1-8b": "llama3-8b",
    "gpt2": "gpt2-124m", "gpt2-medium": "gpt2-355m", "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1.5b", "gpt2-1558m": "gpt2-1.5b", "deepseek-v3-671b": "deepseek-v3",
}  # fmt: skip


def get(name: str) -> Model:
    """The model of that name.

    Args:
        name: for example "llama3-8b".

    Raises:
        ModelError: the name is not in the catalogue; the nearest is suggested.

    Example:
        >>> get("llama3-8b").params
        8030261248
    """
    key = name if name in CATALOGUE else _ALIASES.get(name.lower(), name.lower())
    if key not in CATALOGUE:
        raise ModelError(f"model {name!r} is not in the catalogue; {suggest(key, CATALOGUE)}")
    return CATALOGUE[key]


def variant(name: str, **changes: object) -> Model:
    """A catalogue model with some fields changed (vocabulary padding, fewer layers)."""
    return dataclasses.replace(get(name), **changes)
