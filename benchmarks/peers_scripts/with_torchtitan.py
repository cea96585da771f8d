"""Whether torchtitan's trainer starts on a CPU; see `peers.py`. In August 2026 it needs CUDA."""

from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer


def start(config, batch, num_devices, layout):
    Trainer(llama3_debugmodel())
    raise NotImplementedError("torchtitan's trainer starts here now: write its program")
