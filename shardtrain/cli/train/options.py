"""Options of `shardtrain train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from shardtrain.cli.arguments import plain

EXAMPLES = (
    ("shardtrain train", "the source of Python's standard library, on whatever devices are here"),
    ("shardtrain train --data notes.txt --steps 500", "your own text"),
    ("shardtrain train --strategy data=2,tensor=4", "another layout"),
    ("shardtrain train --strategy fsdp=8,num_microbatches=2 --batch 32", "gradient accumulation"),
    ("shardtrain train --data corpus.jsonl --tokenizer tokenizer.json", "subwords, not bytes"),
)


@dataclass(frozen=True)
class TrainOptions:
    """Train a decoder language model on text, sharded over the devices that are here.

    Without an accelerator it makes 8 virtual CPU devices. The run directory gets checkpoints,
    metrics.jsonl, loss.png and sample.txt; the same command again continues the run. Ctrl-C stops
    after the current step, which is saved.

    Args:
      data: Text: files, directories, or .jsonl with a "text" field. Default: the source of Python's
        standard library.
      tokenizer: A Hugging Face tokenizer.json. Default: one token per byte.
      model: tiny (0.1M parameters), small (2.9M), medium (23M) or large (187M).
      strategy: How to split the work, e.g. data=2,tensor=4,precision=bf16. Default:
        data=2,tensor=2,pipeline=2,num_microbatches=4 on virtual devices, fsdp=-1,precision=bf16 on
        accelerators.
      devices: Virtual CPU devices where there is no accelerator. Default: as many as the strategy
        asks for, or 8.
      steps: Optimizer steps in all, those of earlier sessions included.
      batch: Sequences per step, over all devices and microbatches.
      sequence: Tokens per sequence.
      lr: Peak learning rate; it warms up over a tenth of the steps, then falls to a tenth as a
        cosine. Default: by model size.
      eval_every: Steps between evaluations on held-out text. Default: a quarter of the steps.
      save_every: Steps between checkpoints. Default: a quarter of the steps.
      snapshot_every: Steps between copies of the state in host memory, which a run that was killed
        or goes back asks first. Default: checkpoints only.
      no_guard: Take spikes of the loss as they come, and never go back. A step that is not finite
        is still not taken.
      out: The run directory. Default: runs/MODEL-DATA.
      fresh: Start over in a new directory with a number behind its name.
      seed: Of the parameters, the order of the data and the sample.
      prompt: What the sample at the end continues. Default: some held-out text.
      sample: Tokens of the sample; 0 for none.
      tensorboard: Write TensorBoard event files to the run directory too.
    """

    data: Annotated[tuple[Path, ...], plain("PATH ...")] = ()
    tokenizer: Annotated[Path | None, plain("FILE")] = None
    model: Annotated[str, arg(metavar="NAME")] = "small"
    strategy: Annotated[str | None, plain("STRING")] = None
    devices: Annotated[int | None, plain("N")] = None
    steps: Annotated[int, arg(metavar="N")] = 100
    batch: Annotated[int, arg(metavar="N")] = 16
    sequence: Annotated[int, arg(metavar="N")] = 128
    lr: Annotated[float | None, plain("RATE")] = None
    eval_every: Annotated[int | None, plain("N")] = None
    save_every: Annotated[int | None, plain("N")] = None
    snapshot_every: Annotated[int | None, plain("N")] = None
    no_guard: Annotated[bool, plain()] = False
    out: Annotated[Path | None, plain("DIR")] = None
    fresh: Annotated[bool, plain()] = False
    seed: Annotated[int, arg(metavar="N")] = 0
    prompt: Annotated[str | None, plain("TEXT")] = None
    sample: Annotated[int, arg(metavar="N")] = 400
    tensorboard: Annotated[bool, plain()] = False
