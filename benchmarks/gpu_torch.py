"""The decoder and step of `gpu.py` in PyTorch, as its users write them.

    python benchmarks/gpu_torch.py REQUEST.json RESULT.json     # started by gpu.py

Float32 master parameters and bf16 autocast, flash attention through
`scaled_dot_product_attention`, fused AdamW, `torch.compile` of model and loss. Needs PyTorch only.
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.scale.shape, self.scale, 1e-6).to(x.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`[B, N, T, H]`; half-split pairs."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        dim, head = c["embed_dim"], c["head_dim"]
        self.heads, self.kv_heads, self.head = c["num_heads"], c["num_kv_heads"], head
        self.norms = nn.ModuleList([RMSNorm(dim), RMSNorm(dim)])
        self.query = nn.Linear(dim, self.heads * head, bias=False)
        self.key = nn.Linear(dim, self.kv_heads * head, bias=False)
        self.value = nn.Linear(dim, self.kv_heads * head, bias=False)
        self.out = nn.Linear(self.heads * head, dim, bias=False)
        self.gate = nn.Linear(dim, c["mlp_dim"], bias=False)
        self.up = nn.Linear(dim, c["mlp_dim"], bias=False)
        self.down = nn.Linear(c["mlp_dim"], dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        h = self.norms[0](x)
        split = lambda y, n: y.view(rows, length, n, self.head).transpose(1, 2)
        q = rotary(split(self.query(h), self.heads), cos, sin)
        k = rotary(split(self.key(h), self.kv_heads), cos, sin)
        v = split(self.value(h), self.kv_heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, -1))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, c: dict[str, Any], length: int, remat: bool):
        super().__init__()
        self.embedding = nn.Embedding(c["vocab_size"], c["embed_dim"])
        self.blocks = nn.ModuleList([Block(c) for _ in range(c["num_layers"])])
        self.norm = RMSNorm(c["embed_dim"])
        self.head = nn.Linear(c["embed_dim"], c["vocab_size"], bias=False)
        half = c["head_dim"] // 2
        frequency = c["rope_theta"] ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(length)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.remat = remat

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.remat:
                x = checkpoint(block, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run_case(request: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps; a JSON-able record."""
    case, config = request["case"], request["config"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not request["toy"]:
        raise RuntimeError("this PyTorch sees no CUDA device")
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config, case["length"], case["remat"] != "none")
    optimizer = torch.optim.AdamW(
        model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.randint(0, config["vocab_size"], (case["rows"], case["length"] + 1), device=device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    program = model if request["toy"] else torch.compile(model)
    autocast = lambda: torch.autocast(device, torch.bfloat16)

    def step() -> torch.Tensor:
        with autocast() if device == "cuda" else contextlib.nullcontext():
            loss = program(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    start = time.perf_counter()
    first = float(step())
    compile_s = time.perf_counter() - start
    step()
    times = []
    for _ in range(request["rounds"]):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(request["steps"]):
            step()
        synchronize(device)
        times.append((time.perf_counter() - start) / request["steps"])
    seconds = statistics.median(times)
    tokens_per_step = case["rows"] * case["length"]
    return {
        "case": case,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "step_s": seconds,
        "rounds_s": times,
        "tokens_per_s": tokens_per_step / seconds,
        "mfu": request["model_flops"] / seconds / request["peak"] if request["peak"] else None,
        "first_s": compile_s,
        "loss": first,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    torch.set_float32_matmul_precision("high")
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run_case(request)))


if __name__ == "__main__":
    main()
