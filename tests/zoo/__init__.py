"""Small models in the style of the field, none of which knows anything about sharding.

Each `Case` has a model, its loss and a batch maker; all batches have ragged masks where the family
has tokens, so that means over unequal parts would be caught.
"""

from zoo.case import Case
from zoo.convs import CASES as CONVS
from zoo.decoders import CASES as DECODERS
from zoo.dense import CASES as DENSE
from zoo.latent import CASES as LATENT
from zoo.recurrent import CASES as RECURRENT
from zoo.scanned import CASES as SCANNED
from zoo.seq2seq import CASES as SEQ2SEQ
from zoo.vision import CASES as VISION

ZOO: dict[str, Case] = {
    case.name: case
    for case in (
        *DENSE,
        *CONVS,
        *DECODERS,
        *SCANNED,
        *VISION,
        *SEQ2SEQ,
        *RECURRENT,
        *LATENT,
    )
}

__all__ = ["ZOO", "Case"]
