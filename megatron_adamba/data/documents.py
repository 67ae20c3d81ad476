"""The documents of a micro-batch that begin in its window: where they lie and how much of each is prompt."""

from __future__ import annotations

import numpy as np


def prompt_spans(
    tokens: np.ndarray,
    seq_idx: np.ndarray,
    eod_id: int,
    prompt_end: int | None,
    most: int,
    prompt_tokens: int,
    least_rest: int,
) -> np.ndarray:
    """[batch, most, 3] int64 of up to `most` documents a row: first place, tokens to read, end; zeros for none.

    tokens, seq_idx: [batch, seq]. What is read of a document: no more than prompt_tokens, up to and with its first
    `prompt_end`, or half of it where that is None or does not occur. Documents that do not begin here, with an
    end-of-document token, and those with fewer than least_rest tokens left are passed over.
    """
    spans = np.zeros((tokens.shape[0], most, 3), dtype=np.int64)
    for row, (ids, documents) in enumerate(zip(tokens, seq_idx)):
        bounds = np.flatnonzero(np.diff(documents)) + 1
        starts, ends = np.insert(bounds, 0, 0), np.append(bounds, ids.size)
        count = 0
        for start, end in zip(starts[ids[starts] == eod_id], ends[ids[starts] == eod_id]):
            read = min(prompt_tokens, _prompt_length(ids[start:end], prompt_end))
            if count < most and read > 0 and end - start - read >= least_rest:
                spans[row, count] = start, read, end
                count += 1
    return spans


def _prompt_length(ids: np.ndarray, prompt_end: int | None) -> int:
    marked = np.flatnonzero(ids == prompt_end) if prompt_end is not None else ids[:0]
    return int(marked[0]) + 1 if marked.size else ids.size // 2
