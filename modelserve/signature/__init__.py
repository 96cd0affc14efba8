"""Named, typed inputs: what a request must look like, and how requests become a batch.

``fields`` says what one input is; ``acceptance`` takes an ordinary request in microseconds, a few checks over all
values at once; ``examination`` looks at each value that was not taken, and converts it or names the field that is
wrong; ``batches`` turns rows into columns and back; ``canonical`` gives equal inputs equal bytes; ``examples`` reads
a signature off example rows.
"""

from __future__ import annotations

from modelserve.signature.batches import check_outputs, unstack
from modelserve.signature.examples import columns_of, marks_in
from modelserve.signature.fields import DTYPES, MARKS, Field
from modelserve.signature.signature import Signature

__all__ = ["DTYPES", "MARKS", "Field", "Signature", "check_outputs", "columns_of", "marks_in", "unstack"]
