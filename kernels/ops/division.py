"""How kernels divide their work, and the memory that takes: whole numbers, for a planner without torch or a GPU.

The ops launch by these functions, and planning/workload.py counts by them.
"""

from collections.abc import Sequence
from typing import NamedTuple

PAD = 64
"""Spare columns are a multiple of this: measured best of 16, 32, 64 and 128 on Hopper (bench/levers.md)."""


class Split(NamedTuple):
    """How the work is divided: columns of a program, chunks of tokens, tokens of a chunk."""

    columns: int
    chunks: int
    tokens: int


def split_evenly(tokens: int, block: int, width: int, columns: int, programs: int) -> Split:
    """Divide (T, width) so that the programs that run at once, of `block` tokens per step, end together.

    A program takes a step and a half more to begin and end, and a sum is split into 32 at most: partial sums are
    traffic.
    """
    steps, blocks = cdiv(tokens, block), cdiv(width, columns)

    def duration(chunks: int) -> float:
        return cdiv(blocks * chunks, programs) * (cdiv(steps, chunks) + 1.5)

    chunk = block * cdiv(steps, min(range(1, min(steps, 32) + 1), key=duration))
    return Split(columns, cdiv(tokens, chunk), chunk)


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def rank_block(rank: int) -> int:
    """Columns of a tile that holds `rank`: what a matrix product takes."""
    return max(16, 1 << (rank - 1).bit_length())


def choose_block(tokens: int, per_token: int, num_experts: int) -> int:
    """Rows of expert_rows.py's tile: 128, or 64 where an expert has too few rows on average to fill such tiles."""
    return 128 if tokens * per_token >= 256 * num_experts else 64


def capacity(tokens: int, per_token: int, num_experts: int, block: int) -> int:
    """Rows of experts that any routing of so many tokens fits into."""
    pairs = tokens * per_token
    return (pairs + min(num_experts, pairs) * (block - 1)) // block * block


LORA_B_TOKENS, LORA_B_COLUMNS = 64, 128
"""Tile of lora_b.py's kernel."""
LORA_B_PROGRAMS = 2
"""Programs per multiprocessor at once."""
LORA_B_RANK = 32
"""Largest rank: more sums take more registers than a thread has."""


def lora_b_fits(groups: Sequence[tuple[int, int]], rank: int) -> bool:
    """Whether lora_b.py has a kernel for columns of these groups."""
    return rank <= LORA_B_RANK and rank % 8 == 0 and all(begin % LORA_B_COLUMNS == 0 for begin, _ in groups)


def lora_b_split(tokens: int, groups: Sequence[tuple[int, int]], sms: int) -> Split:
    """Give a program of lora_b.py two tiles of columns, or one: all of one group, and none without any."""
    tiles = 1 if any(edge % (2 * LORA_B_COLUMNS) for group in groups for edge in group) else 2
    return split_evenly(tokens, LORA_B_TOKENS, groups[-1][1], tiles * LORA_B_COLUMNS, LORA_B_PROGRAMS * sms)


def lora_b_bytes(tokens: int, groups: Sequence[tuple[int, int]], rank: int, sms: int = 132) -> int:
    """Memory of lora_b.py's partial sums, on a Hopper card of so many multiprocessors; 0 where cuBLAS multiplies."""
    if not lora_b_fits(groups, rank):
        return 0
    width, work = groups[-1][1], lora_b_split(tokens, groups, sms)
    return 4 * rank * (cdiv(width, work.columns) * tokens + work.chunks * width)


class Launch(NamedTuple):
    """What a program owns (columns) and reads at a time (tokens), its warps, the tiles in flight, programs per SM."""

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int


SWIGLU_LORA_LAUNCHES = {16: Launch(32, 64, 4, 3, 8)}
"""Launches of swiglu_lora.py by rank, rounded up, as measured. Other ranks run apart: their sums take registers and
traffic. Tokens are split for `programs` on each multiprocessor at most: one more would be a wave of its own."""
SWIGLU_LORA_CHUNK = 256
"""Least tokens per program: its sums over them are 12 r I bytes that are written and read again."""
SWIGLU_LORA_HOPPER_TOKENS, SWIGLU_LORA_HOPPER_COLUMNS = 64, 128
"""Tile of swiglu_lora_hopper.py's kernel."""
SWIGLU_LORA_HOPPER_TILES = {16: 2, 32: 1}
"""Tiles of columns per program of it, by rank, rounded up. More sums do not fit into registers."""


def swiglu_lora_split(tokens: int, width: int, block: int, sms: int) -> Split:
    """Divide the work of swiglu_lora.py; `block` is `rank_block` of the rank."""
    launch = SWIGLU_LORA_LAUNCHES[block]
    steps = cdiv(tokens, launch.tokens)
    most = max(1, launch.programs * sms // cdiv(width, launch.columns))
    per_chunk = max(SWIGLU_LORA_CHUNK // launch.tokens, cdiv(steps, most))
    return Split(launch.columns, cdiv(steps, per_chunk), per_chunk * launch.tokens)


def swiglu_lora_hopper_fits(width: int, rank: int) -> bool:
    """Whether matrices of this width and rank have swiglu_lora_hopper.py's kernel: whole tiles, rows that TMA takes."""
    tiles = SWIGLU_LORA_HOPPER_TILES.get(rank_block(rank))
    return tiles is not None and width % (SWIGLU_LORA_HOPPER_COLUMNS * tiles) == 0 and rank % 4 == 0


def swiglu_lora_hopper_split(tokens: int, width: int, block: int, sms: int) -> Split:
    """Divide the work of swiglu_lora_hopper.py among multiprocessors that hold one program each."""
    columns = SWIGLU_LORA_HOPPER_COLUMNS * SWIGLU_LORA_HOPPER_TILES[block]
    return split_evenly(tokens, SWIGLU_LORA_HOPPER_TOKENS, width, columns, sms)


def swiglu_lora_bytes(tokens: int, width: int, rank: int, sms: int = 132) -> int:
    """Memory of the partial sums of dB and dA, on a card of so many multiprocessors: what either kernel takes."""
    block, chunks = rank_block(rank), 0
    if swiglu_lora_hopper_fits(width, rank):
        chunks = swiglu_lora_hopper_split(tokens, width, block, sms).chunks
    if block in SWIGLU_LORA_LAUNCHES:
        chunks = max(chunks, swiglu_lora_split(tokens, width, block, sms).chunks)
    return 12 * rank * width * chunks


FA4_LENGTH = 2048
"""Bound on the length, in tokens, from which FlashAttention-4 (attention_fa4.py) is used."""
FA4_HEAD_DIMS = (64, 96, 128)


def fa4_suits(length: int, head_dim: int) -> bool:
    """Whether FlashAttention-4 is the fastest for sequences of up to so many tokens, and has such heads."""
    return length >= FA4_LENGTH and head_dim in FA4_HEAD_DIMS


def fa4_bytes(tokens: int, q_width: int, kv_width: int) -> int:
    """Memory of FlashAttention-4's backward: fp32 sums of dq, dk and dv."""
    return 4 * tokens * (q_width + 2 * kv_width)


CUDNN_LENGTH = 32768
"""Longest sequences that cuDNN differentiates, in tokens: its memory grows with the square, 8 GiB for four query heads
here. FlashAttention-2 takes longer ones where FlashAttention-4 does not."""


def flash_bytes(tokens: int, heads: int, kv_heads: int, head_dim: int, at_once: int, sms: int = 132) -> int:
    """Memory of FlashAttention-2's deterministic backward, of one sequence: more of them take less.

    It sums dq in fp32 apart for each part of a card of so many multiprocessors, and dk and dv of every query head.

    Args:
        tokens: T.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: D.
        at_once: key heads, with their query heads, that a call takes; the gradients of fewer than all are copied.
        sms: multiprocessors.
    """
    queries = at_once * heads // kv_heads
    every_head = 4 * (tokens + PADDED_TOKENS) * queries * head_dim
    grouped = every_head if kv_heads < heads else 0
    copied = 2 * tokens * (queries + 2 * at_once) * head_dim if at_once < kv_heads else 0
    return cdiv(sms, queries) * every_head + grouped + copied + 4 * (tokens + PADDED_TOKENS) * queries


def flash_key_heads(workspace: int | None, tokens: int, heads: int, kv_heads: int, head_dim: int, sms: int) -> int:
    """How many key heads a call takes at most within so many bytes; all without a limit, one where none fits."""
    fitting = (
        number
        for number in divisors(kv_heads)
        if workspace is None or flash_bytes(tokens, heads, kv_heads, head_dim, number, sms) <= workspace
    )
    return max(fitting, default=1)


PADDED_TOKENS = 128
"""Tokens that FlashAttention-2's sums are longer by."""


def cudnn_bytes(heads: int, scores: int, shape: Sequence[int], *, ragged: bool) -> int:
    """Memory of cuDNN's deterministic backward (attention.py) for so many query heads at once.

    It keeps the gradient of the scores in 16 bits and dq in fp32; of ragged sequences dq of all heads, and dk and dv of
    every query head.

    Args:
        heads: query heads at once.
        scores: elements of one head's scores, padding included.
        shape: (tokens, query heads, head width) of q.
        ragged: whether sequences differ in length.
    """
    tokens, all_heads, head_dim = shape
    sums = 8 * tokens * all_heads * head_dim if ragged else 4 * tokens * heads * head_dim
    return 2 * scores * heads + sums
