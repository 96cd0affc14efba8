"""Named, typed inputs: what a request must look like, and how requests become a batch.

``fields`` says what one input is; ``acceptance`` takes an ordinary request in microseconds, a few checks over all
values at once; ``examination`` looks at each value that was not taken, and converts it or names the field that is
wrong; ``large`` does so in steps where there is much to look at, and takes long lists in ``pieces``; ``extent`` says
how much a request can hold; ``batches`` turns rows into columns and back; ``canonical`` gives equal inputs equal bytes;
``examples`` reads a signature off example rows.
"""

from __future__ import annotations

from modelserve.signature.batches import check_outputs, unstack
from modelserve.signature.examples import columns_of, marks_in
from modelserve.signature.extent import MAX_BODY_BYTES, Extent, refuse_unaskable
from modelserve.signature.fields import DTYPES, MARKS, Field
from modelserve.signature.large import AT_ONCE
from modelserve.signature.pieces import Pieces
from modelserve.signature.signature import Signature

__all__ = [
    "AT_ONCE",
    "DTYPES",
    "MARKS",
    "MAX_BODY_BYTES",
    "Extent",
    "Field",
    "Pieces",
    "Signature",
    "check_outputs",
    "columns_of",
    "marks_in",
    "refuse_unaskable",
    "unstack",
]
