"""The shape of a transformer, and what follows from it: parameters, FLOPs, keys seen."""

from dataclasses import dataclass


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
            >>> Model("tiny", 2, 64, 4, 4, 16, 256, 1000).flops_per_token(128)
            1268736.0
        """
        qk, value = self.attention_width()
        attention = 6 * (qk + value) * self.attention_tokens(sequence, causal)
        extra = self.mtp * (self.active_block_matmul / self.layers + self.vocab * self.d_model)
        return 6 * (self.active_matmul + extra) + attention
