"""Rows as token pairs, without the cache that `prepare` keeps of them."""

from __future__ import annotations

from collections.abc import Sequence

from fpo_mlx.data.messages import RowFault
from fpo_mlx.data.rows import PreferenceRow
from fpo_mlx.data.tokenize import TokenizedPairs, Tokenizer, cut_to, gathered, tokenize_batch


def tokenize_rows(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, max_seq_length: int
) -> TokenizedPairs:
    """Raises DataError naming every row that cannot be tokenized, or when no pair is left."""
    made = list(zip(rows, tokenize_batch(rows, tokenizer), strict=True))
    faults = [(row.where, one) for row, one in made if isinstance(one, RowFault)]
    if faults:
        raise gathered(faults, len(rows))
    return cut_to([one.pair for _, one in made], max_seq_length)
