"""Whether a model can be served as its options say: what it was measured to take, beside what they allow.

Each finding is a sentence that begins with the option and has both figures. None of them keeps a version from serving:
they say why it will not do what is expected of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from modelserve.config import ModelOptions

MOST_CACHED_STRINGS: Final = 65_536
"""Of how many strings a row may consist to have a key in the prediction cache: they are hashed on the event loop."""


def misfits(
    options: ModelOptions,
    seconds: Mapping[int, float],
    *,
    strings: int = 0,
    replica_bytes: int | None = None,
    memory_bytes: int | None = None,
) -> tuple[str, ...]:
    """Return what cannot work.

    ``seconds`` are the times of a warm-up by rows in the batch, ``strings`` how many a row has,
    ``replica_bytes`` is what one replica takes at least and ``memory_bytes`` all that there is; what is not known is
    left out.
    """
    found = [*_of_time(options, seconds), *_of_waiting(options), *_of_caching(options, strings)]
    if replica_bytes is not None and memory_bytes is not None:
        found += _of_memory(options, replica_bytes, memory_bytes)
    return tuple(found)


def _of_time(options: ModelOptions, seconds: Mapping[int, float]) -> Iterator[str]:
    row_s = seconds.get(1, 0.0)
    row, row_ms = f"{row_s:.3g} s", row_s * 1000
    if row_ms > options.timeout_ms:
        yield f"timeout_ms={options.timeout_ms:g} is less than the {row} that one row takes: no request is answered"
    if row_ms > options.slo_ms:
        yield f"slo_ms={options.slo_ms:g} is less than the {row} that one row takes: no batch size can hold it"
    if row_s > options.hang_limit_s and len(seconds) == 1:  # from two sizes on, how slow is ordinary has been learned
        yield (
            f"hang_limit_s={options.hang_limit_s:g} is less than the {row} that a batch takes: one that begins shortly "
            "before its deadline passes for hung, and its worker is replaced"
        )
    for features in options.declared_features:
        if row_ms <= options.timeout_ms < features.budget_ms + row_ms:
            yield (
                f"features.budget_ms={features.budget_ms:g} leaves too little of timeout_ms={options.timeout_ms:g} for "
                f"the {row} that one row takes: while the store is slow, requests are late, not answered by defaults"
            )


def _of_waiting(options: ModelOptions) -> Iterator[str]:
    limit = options.queue_limit
    if options.max_batch_size != "auto" and options.max_batch_size > limit:
        yield f"max_batch_size={options.max_batch_size} is never reached: queue_limit={limit} rows wait at most"
    smallest, largest = options.replica_range
    if largest > smallest and options.scaling.out_above >= limit:
        yield (
            f"scaling.out_above={options.scaling.out_above:g} is never exceeded by queue_limit={limit} rows that wait: "
            "the pool grows only while requests are refused"
        )
    if options.max_wait_ms >= options.slo_ms:
        yield f"max_wait_ms={options.max_wait_ms:g} uses up slo_ms={options.slo_ms:g}: a partial batch is always late"


def _of_caching(options: ModelOptions, strings: int) -> Iterator[str]:
    if options.cache_ttl_s and strings > MOST_CACHED_STRINGS:
        yield (
            f"cache_ttl_s={options.cache_ttl_s:g} has no effect on rows of {strings} strings: the cache takes rows of "
            f"at most {MOST_CACHED_STRINGS}"
        )


def _of_memory(options: ModelOptions, each: int, memory: int) -> Iterator[str]:
    smallest, largest = options.replica_range
    if largest * each > memory:
        needed = _megabytes(largest * each)
        yield f"replicas={largest} take at least {needed} of memory, and there are {_megabytes(memory)}"
    elif options.reload == "overlap" and 2 * smallest * each > memory:
        yield (
            f'reload="overlap" needs at least {_megabytes(2 * smallest * each)} of memory to load the next version '
            f'beside this one, and there are {_megabytes(memory)}; set reload="replace"'
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
