"""One PyTorch process, eager (`layout="eager"`) or compiled; see `peers.py`."""

import torch
from torch.nn import functional
from torch_decoder import Decoder


def start(config, batch, num_devices, layout):
    model = Decoder(config)
    if layout == "compile":
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def step(state, batch):
        logits = model(batch["tokens"])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return state, loss.detach()

    return model, step
