"""What the model takes: bytes beside its weights, and the arithmetic of a pass. Knows shapes, neither tensors nor torch.

Shape letters are those of ops.py. Every formula is laid out as a bill, one factor or one summand a line.
"""

from __future__ import annotations

from offload_sirius.quantization import FEW_TOKENS, UNPACKED_ROWS
from offload_sirius_loaders.spec import ModelSpec

CHUNK_SIZE = 512
"""Tokens of a prompt that are computed at once: enough to keep the arithmetic units busy, few enough for small activations."""


LEAST_SCORED_SLOTS, MOST_SCORED_SLOTS, MOST_SCORES = 64, 1024, 1 << 20
"""Slots of a cache in 8 bits that attention looks at at once, and the scores of all heads that it wants no more of then."""

LEAST_EXTENT = 256
"""Slots of the cache that a step of fixed extent looks at, at least. Others are twice as many, and so on up to the whole cache:
never more than twice what is needed, and few steps to record."""

GRAPH_POOL_NBYTES = 22 << 20
"""What torch takes for a pool of memory beyond what is used of it: one piece of each size, 2 and 20 MiB."""

GRAPH_KERNELS, GRAPH_KERNEL_NBYTES = 48, 2048
"""Kernels of a layer in a recorded step, where torch has no kernel for a whole norm, and what the driver keeps of each on the
device. The second is assumed, as nobody has measured it."""


def kv_cache_nbytes(spec: ModelSpec, batch: int, capacity: int, element_nbytes: int) -> int:
    """Bytes of a cache for that many sequences of `capacity` positions."""
    return (
        2  # keys and values
        * spec.num_layers
        * batch
        * spec.num_kv_heads
        * capacity
        * spec.head_dim
        * element_nbytes
    )


def quantized_kv_cache_nbytes(spec: ModelSpec, batch: int, capacity: int) -> int:
    """The same with keys and values in 8 bits."""
    return (
        2  # keys and values
        * spec.num_layers
        * batch
        * spec.num_kv_heads
        * capacity
        * (spec.head_dim + 4)  # integers, and a scale
    )


def scored_slots(num_rows: int) -> int:
    """Slots of a cache in 8 bits that queries, so many rows of all heads together, look at at once."""
    return max(LEAST_SCORED_SLOTS, min(MOST_SCORED_SLOTS, MOST_SCORES // num_rows))


def quantized_attention_nbytes(spec: ModelSpec, num_rows: int, num_positions: int) -> int:
    """Upper bound of the device bytes that attention to such a cache takes beside what it takes to any, in passes of so many
    tokens and in smaller ones."""
    rows, slots = num_rows * spec.num_heads, min(MOST_SCORED_SLOTS, num_positions)
    scores = max(min(rows * slots, MOST_SCORES), rows * min(LEAST_SCORED_SLOTS, slots))
    return (
        3 * 4 * scores  # as computed, in float32, and as weights
        + 5 * 4 * rows * spec.head_dim  # queries scaled, values mixed, what a range of slots adds to them, and its product
        + 4 * 4 * rows  # largest scores before and after, sums of weights, what fades
        + 3 * 4 * spec.num_kv_heads * slots * spec.head_dim  # a range of keys or values, in float32, as computed, and turned
    )


def rotary_nbytes(spec: ModelSpec, num_positions: int, element_nbytes: int) -> int:
    """Bytes of the table."""
    return (
        2  # cosines and sines
        * num_positions
        * spec.head_dim
        * element_nbytes
    )


def activation_nbytes(
    spec: ModelSpec,
    num_tokens: int,
    element_nbytes: int,
    chunk_size: int = CHUNK_SIZE,
    *,
    step_rows: int = 1,
    observed: bool = False,
) -> int:
    """Upper bound of the device bytes that a prefill of that many tokens needs beside weights, cache and position tables.

    Enough for steps of step_rows tokens afterwards, too, of one sequence or of several, none of which has more than num_tokens
    positions. What kernels take for themselves (tiles, packed operands) is not in it. observed: what neurons say of the prompt is
    looked at.
    """
    hidden = max(num_tokens, step_rows) * spec.width * element_nbytes
    rows = max(min(chunk_size, num_tokens), step_rows)
    return hidden + max(
        _norm_nbytes(spec, rows, element_nbytes),
        _attention_nbytes(spec, rows, num_tokens, element_nbytes),
        _feed_forward_nbytes(spec, rows, element_nbytes, observed=observed),
        step_rows * _logits_nbytes(spec, element_nbytes),
    )


def scored_rows(
    spec: ModelSpec,
    num_tokens: int,
    element_nbytes: int,
    chunk_size: int = CHUNK_SIZE,
    *,
    step_rows: int = 1,
    observed: bool = False,
) -> int:
    """Tokens whose logits there is room for at once when the layers are done, in the memory that activation_nbytes plans for."""
    planned = activation_nbytes(spec, num_tokens, element_nbytes, chunk_size, step_rows=step_rows, observed=observed)
    hidden = max(num_tokens, step_rows) * spec.width * element_nbytes
    return (planned - hidden) // _logits_nbytes(spec, element_nbytes)


def unpacking_nbytes(spec: ModelSpec, element_nbytes: int, step_rows: int) -> int:
    """Upper bound of the device bytes that products with quantised matrices take beside their operands.

    rows     = rows that are dequantised at once: as bytes, in float32 with their scales and zeros, and as they are computed with
    products = of a step's tokens, in float32
    """
    width = max(spec.width, spec.num_heads * spec.head_dim)
    rows = UNPACKED_ROWS * width * (1 + 3 * 4 + element_nbytes)
    products = 2 * min(step_rows, FEW_TOKENS) * max(spec.ffn_width, 2 * width) * 4  # the gates' and the ups'
    return rows + products


def position_tables_nbytes(spec: ModelSpec, num_positions: int, element_nbytes: int, batch: int = 1) -> int:
    """Device bytes that a model keeps for that many positions of each sequence beside the caches: rotations, of each sequence its
    own where they depend on its prompt, and their numbers as int64."""
    num_tables = batch if spec.rope.kind == "dynamic" else 1
    return num_tables * rotary_nbytes(spec, num_positions, element_nbytes) + 8 * num_positions


def extents(capacity: int) -> tuple[int, ...]:
    """All extents of a cache of that many positions, ascending."""
    found = [LEAST_EXTENT]
    while found[-1] < capacity:
        found.append(2 * found[-1])
    return (*found[:-1], capacity)


def extent_of(position: int, capacity: int) -> int:
    """The least extent in which a position lies."""
    return next(extent for extent in extents(capacity) if position < extent)


def fixed_step_nbytes(spec: ModelSpec, element_nbytes: int) -> int:
    """Device bytes of what goes into a step of fixed places, and what comes out."""
    return (
        element_nbytes * spec.width  # the embedded token
        + 8  # its position
        + 4 * spec.vocab_size  # logits
    )


def recorded_steps_nbytes(spec: ModelSpec, capacity: int, element_nbytes: int) -> int:
    """Upper bound of the device bytes of such steps, recorded for every extent. They compute in one pool of memory."""
    return (
        fixed_step_nbytes(spec, element_nbytes)
        + GRAPH_POOL_NBYTES
        + activation_nbytes(spec, 1, element_nbytes)
        + capacity * len(set(spec.layer_windows)) * (3 + element_nbytes)  # what a layer sees, as flags and as numbers
        + len(extents(capacity)) * spec.num_layers * GRAPH_KERNELS * GRAPH_KERNEL_NBYTES
    )


def _norm_nbytes(spec: ModelSpec, num_rows: int, element_nbytes: int) -> int:
    row_nbytes = (
        3 * 4  # input, its square, and the result in float32
        + element_nbytes  # result
    )
    return num_rows * spec.width * row_nbytes


def _attention_nbytes(spec: ModelSpec, num_rows: int, num_positions: int, element_nbytes: int) -> int:
    heads_per_row = (
        spec.num_heads + 2 * spec.num_kv_heads  # projected queries, keys and values
        + 2 * (spec.num_heads + spec.num_kv_heads)  # queries and keys, turned and with swapped halves
        + 3 * spec.num_heads  # queries in rows of their group, what they mix, and that in rows of tokens
    )  # fmt: skip
    group_size = spec.num_heads // spec.num_kv_heads
    mask_nbytes = (
        3  # causal, window, and both
        + group_size  # both for every row of a group
        + 2 * group_size * element_nbytes  # the same as numbers to be added, and padded to the kernel's alignment
    )
    return (
        2 * num_rows * spec.width * element_nbytes  # normed input, and output
        + heads_per_row * num_rows * spec.head_dim * element_nbytes
        + num_rows * num_positions * mask_nbytes
    )


def _feed_forward_nbytes(spec: ModelSpec, num_rows: int, element_nbytes: int, *, observed: bool) -> int:
    row_elements = (
        2 * spec.width  # normed input, and output
        + 2 * spec.ffn_width  # gate and what the activation makes of it, or that and up
    )
    observed_nbytes = (
        2 * 4  # what neurons say, and its square, in float32
        * spec.ffn_width
    ) if observed else 0  # fmt: skip
    return num_rows * (row_elements * element_nbytes + observed_nbytes)


def _logits_nbytes(spec: ModelSpec, element_nbytes: int) -> int:
    return spec.vocab_size * (
        element_nbytes  # as computed
        + 4  # in float32
    )


def attended_pairs(num_tokens: int, num_cached: int = 0, chunk_size: int = CHUNK_SIZE) -> int:
    """Query and key pairs that one head computes for that many tokens behind num_cached others: each chunk sees the positions
    up to its last one, masked ones included. Sliding windows, which see less, are not counted."""
    starts = range(0, num_tokens, chunk_size)
    stops = [min(start + chunk_size, num_tokens) for start in starts]
    return sum((stop - start) * (num_cached + stop) for start, stop in zip(starts, stops, strict=True))


def mixing_flops(spec: ModelSpec, num_pairs: int) -> int:
    """Arithmetic of attention itself in one layer, the projections apart."""
    return (
        2  # a multiplication and an addition
        * 2  # scores, and the values they mix
        * num_pairs
        * spec.num_heads
        * spec.head_dim
    )
