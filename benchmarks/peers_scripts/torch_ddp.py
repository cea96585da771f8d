"""PyTorch's DistributedDataParallel over gloo; see `peers.py`."""

import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch_decoder import Decoder


def start(config, batch, num_devices, layout):
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = DistributedDataParallel(Decoder(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def step(state, batch):
        mine = {name: array.chunk(world)[rank] for name, array in batch.items()}
        logits = model(mine["tokens"])
        loss = functional.cross_entropy(logits.flatten(0, 1), mine["targets"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return state, loss.detach()

    return model, step
