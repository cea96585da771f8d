"""PyTorch's FSDP2 (`fully_shard`) over gloo; see `peers.py`."""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch_decoder import Decoder


def start(config, batch, num_devices, layout):
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = Decoder(config)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def step(state, batch):
        mine = {name: array.chunk(world)[rank] for name, array in batch.items()}
        logits = model(mine["tokens"])
        loss = functional.cross_entropy(logits.flatten(0, 1), mine["targets"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return state, loss.detach()

    return model, step
