"""A model and a step as the planner sees them: how many bytes its tensors take on the device, at each moment.

All sizes are bytes, as `torch.cuda.max_memory_allocated` counts them; names of tensors are decoder_layer.py's.
"""

from dataclasses import dataclass
from functools import lru_cache

from finemill.kernels.engine.plan import LayerShape, Level
from finemill.kernels.ops.division import (
    CUDNN_LENGTH,
    FA4_LENGTH,
    PAD,
    cudnn_bytes,
    fa4_bytes,
    flash_bytes,
    lora_b_bytes,
    swiglu_lora_bytes,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` in configurations of transformers that the engine trains."""
CUBLAS_WORKSPACE = 64 << 20
"""Bytes that torch allocates for cuBLAS on Hopper: 32 MiB each for eager work and for captured graphs."""
SMALL_TENSORS = 8 << 20
"""Bytes of code tables, rotary tables, the batch and its sums, scalars."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight: code, double-quantized scale, nested scale."""
LONG_ROW = 16384
"""Tokens of a row above which attention takes more time than all else: its output alone is worth keeping, and a dense
layer's second half takes `MLP_TILE` tokens at a time."""
MLP_TILE = 8192
PADDED_ROWS = 8
"""Rows of scores per token: what attention keeps of a ragged batch at most, padding included (more where sequences are
shorter than 16 tokens)."""
OPTIMIZER_BYTES = (8.0, 2.0 + 8 / 256)
"""Bytes per adapter element of both moments: in fp32, and in 8 bits with an fp32 scale per 256."""


def block_bytes(size: int) -> int:
    """What torch's allocator counts for a tensor of its own: a rest of up to 1 MiB of its 2 MiB pages is not split off.

    This is 2 MiB for each kept decoded layer of Qwen3; smaller tensors and reused memory are split to 512 bytes.
    """
    size = -(-size // 512) * 512
    rest = -size % (2 << 20)
    return size + rest if size >= 10 << 20 and rest <= 1 << 20 else size


@dataclass(frozen=True)
class LayerBytes:
    """Device memory of one layer in a micro-batch, by the level it keeps.

    Args:
        x: one tensor of the residual stream.
        saved: what waits for the backward.
        parkable: the part of `saved` that can be parked.
        forward: peak of the forward, inputs apart.
        backward: peak of the backward, its own saved tensors and both gradients included.
    """

    x: int
    saved: dict[Level, int]
    parkable: dict[Level, int]
    forward: dict[Level, int]
    backward: dict[Level, int]

    def peak(self, level: Level, in_forward: int, in_backward: int) -> int:
        """Peak of a layer's passes, with what is allocated beside it in each."""
        return max(in_forward + self.forward[level], in_backward + self.backward[level])


@dataclass(frozen=True)
class Workload:
    """A model and a step, as far as memory and time depend on them.

    Args:
        shape: widths of a layer.
        num_layers: how many.
        vocabulary: rows of the head.
        tied: head and embedding are one tensor.
        rank: LoRA rank of each of the seven linear layers.
        quantized: NF4 base, else 16-bit.
        kept_bytes: device memory of those matrices of an NF4 base that have 16 bits.
        tokens: per optimizer step.
        row: tokens per row; micro-batches are whole rows.
        whole: whether the step is one micro-batch, as that of a loss that compares its rows.
        ragged: whether batches are a trainer's: sequences shorter than `row`, whose attention is padded, and an eighth
            of the tokens or more without label, so that the head gathers the others.
        optimizer_bytes: per adapter parameter, states only.
        embedding_on_host: whether the embedding lives in host memory.
        stream_weights: whether NF4 weights visit the device two layers at a time.
        shards: GPUs that keep a part of the NF4 weights each, from which they visit; 1 where they come from the host.
        resident_layers: whose weights stay there all the same.
        typical: length of the sequence that a token is in, on average, in a ragged batch; None for `row`. Only time
            depends on it: memory is planned for the longest.
        key_heads: that attention's backward takes at once, with their query heads; None for all.
        fa4: whether full rows run on FlashAttention-4.
        flash: whether they run on FlashAttention-2, being longer than cuDNN takes.
        cudnn: whether shorter rows then run on cuDNN.
        mlp_tile: tokens that a dense layer's second half takes at a time; None for all.
    """

    shape: LayerShape
    num_layers: int
    vocabulary: int
    tied: bool
    rank: int
    quantized: bool
    tokens: int
    row: int
    ragged: bool = False
    whole: bool = False
    typical: int | None = None
    optimizer_bytes: float = 8.0
    embedding_on_host: bool = False
    stream_weights: bool = False
    kept_bytes: int = 0
    shards: int = 1
    resident_layers: int = 0
    key_heads: int | None = None
    fa4: bool = False
    flash: bool = False
    cudnn: bool = True
    mlp_tile: int | None = None

    @property
    def mlp_tiles(self) -> tuple[int | None, ...]:
        """Values of `mlp_tile` that are worth trying."""
        if self.row <= LONG_ROW or self.shape.experts is not None:
            return (None,)
        # No kernel has been run on a matrix of 2^31 elements.
        return (MLP_TILE,) if self.row * self.widths["gate_up"] // 2 >= 2**31 else (None, MLP_TILE)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels that are worth trying: gate|up are never whole where they are made in tiles."""
        short = {Level.ATTENDED} if self.row <= LONG_ROW else set()
        most = Level.ALL if self.mlp_tile is None else Level.ATTENTION
        return tuple(level for level in Level if level <= most and level not in short)

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's seven matrices."""
        s = self.shape
        return s.hidden * (s.qkv_width + s.q_width + 3 * s.intermediate)

    @property
    def nf4_bytes(self) -> int:
        """Device memory of a layer's seven quantized matrices."""
        s = self.shape
        kv = s.num_kv_heads * s.head_dim
        outputs = (s.q_width, kv, kv, s.q_width, s.intermediate, s.intermediate, s.intermediate)
        codes = sum(block_bytes(n * s.hidden // 2) for n in outputs)
        return codes + int(self.layer_weights * (NF4_BYTES - 0.5))

    @property
    def pads(self) -> tuple[int, ...]:
        """Spare columns of qkv, o, gate-up and down."""
        return tuple(-(-members * self.rank // PAD) * PAD for members in (3, 1, 2, 1))

    @property
    def extended_bytes(self) -> int:
        """Device memory of a layer's four extended 16-bit weights."""
        s = self.shape
        outputs = (s.qkv_width, s.hidden, 2 * s.intermediate, s.hidden)
        inputs = (s.hidden, s.q_width, s.hidden, s.intermediate)
        return sum(block_bytes(2 * (n + pad) * (k + pad)) for n, k, pad in zip(outputs, inputs, self.pads, strict=True))

    @property
    def scratch_bytes(self) -> int:
        """Device memory of the buffers that a layer's weights are decoded into."""
        return self.extended_bytes

    @property
    def most_parked(self) -> Level:
        """The highest level whose tensors may wait in host memory."""
        return Level.GATE_UP

    @property
    def adapter_elements(self) -> int:
        """Elements of all LoRA matrices."""
        s = self.shape
        outputs = s.qkv_width + s.hidden + 2 * s.intermediate + s.hidden
        inputs = 3 * s.hidden + s.q_width + 2 * s.hidden + s.intermediate
        return self.rank * (outputs + inputs) * self.num_layers

    def static_bytes(self) -> int:
        """Weights, adapters, gradient and optimizer states."""
        s = self.shape
        table = 2 * self.vocabulary * s.hidden
        tables = table * (1 if self.tied or self.embedding_on_host else 2)
        layers: float = self.num_layers
        if self.stream_weights and self.shards > 1:
            layers = 2 + self.num_layers / self.shards
        elif self.stream_weights:
            layers = min(2 + self.resident_layers, self.num_layers)
        base = int(layers * (self.nf4_bytes if self.quantized else self.extended_bytes))
        norms = 2 * self.num_layers * (2 * s.hidden + 2 * s.head_dim)
        adapters = int(self.adapter_elements * (8 + self.optimizer_bytes))
        return tables + base + self.kept_bytes + norms + adapters + CUBLAS_WORKSPACE + SMALL_TENSORS

    def loading_bytes(self) -> int:
        """What loading the whole base onto the device takes: all of it, and a matrix on its way from 16 bits to NF4."""
        s = self.shape
        tables = 2 * self.vocabulary * s.hidden * (1 if self.tied else 2)
        base = self.num_layers * (self.nf4_bytes if self.quantized else 2 * self.layer_weights)
        return tables + base + 4 * s.hidden * s.intermediate

    @property
    def widths(self) -> dict[str, int]:
        """Bytes per token of what a layer computes, under the names of decoder_layer.py."""
        s, (qkv_pad, o_pad, gate_up_pad, down_pad) = self.shape, self.pads
        return {
            "x": 2 * s.hidden,
            "xa": 2 * 7 * self.rank,
            "normed_in": 2 * (s.hidden + qkv_pad),
            "qkv": 2 * (s.qkv_width + qkv_pad),
            "q": 2 * s.q_width,
            "kv": 2 * s.num_kv_heads * s.head_dim,
            "rstd_qk": 4 * (s.num_heads + s.num_kv_heads),
            "attended": 2 * (s.q_width + o_pad),
            "state": 4 * s.num_heads * (PADDED_ROWS if self.ragged else 1),
            "normed_mid": 2 * (s.hidden + gate_up_pad),
            "gate_up": 2 * (2 * s.intermediate + gate_up_pad),
            "hidden": 2 * (s.intermediate + down_pad),
            "grad_hidden": 2 * s.intermediate,
            "grad": 2 * (s.hidden + max(o_pad, down_pad)),
            "rstd": 4,
        }

    def tensor_bytes(self, tokens: int) -> dict[str, int]:
        """Device memory of what a layer computes."""
        return {name: block_bytes(width * tokens) for name, width in self.widths.items()}

    def host_bytes_per_token(self) -> dict[Level, int]:
        """Host memory that a parked layer takes."""
        return parkable_bytes(self.widths)

    def attention_workspace(self, tokens: int) -> int:
        """Memory that the deterministic backward takes: FlashAttention's, and cuDNN's for the heads done at once."""
        s = self.shape
        long = fa4_bytes(tokens, s.q_width, s.num_kv_heads * s.head_dim) if self.fa4 else 0
        if self.fa4 and not self.ragged:
            return long
        shape = (tokens, s.num_heads, s.head_dim)
        if self.flash:
            long = flash_bytes(tokens, s.num_heads, s.num_kv_heads, s.head_dim, self.key_heads or s.num_kv_heads)
            # A batch without such a long row runs on cuDNN, which takes a key head of a sequence at least.
            group, beside = s.num_heads // s.num_kv_heads, self.ragged and self.cudnn
            return max(long, cudnn_bytes(group, CUDNN_LENGTH**2, shape, ragged=True) if beside else 0)
        heads = (self.key_heads or s.num_kv_heads) * s.num_heads // s.num_kv_heads
        row = min(self.row, FA4_LENGTH) if self.fa4 else self.row
        return max(long, cudnn_bytes(heads, tokens * row, shape, ragged=self.ragged))

    def head_bytes(self, tokens: int, chunk: int) -> int:
        """Peak of the loss head, its first input apart."""
        t = self.tensor_bytes(tokens)
        # Two inputs and a gradient of 7/8 of the rows, at most, in place of one normed tensor of all.
        gathered = 5 * t["x"] // 2 if self.ragged else 0
        return 2 * t["x"] + gathered + 16 * tokens + max(t["grad"], block_bytes(2 * chunk * self.vocabulary))

    def forward_bytes(self, t: dict[str, int], tokens: int) -> dict[Level, int]:
        """Peak of a layer's forward by what it keeps, from `tensor_bytes`."""
        stream = 2 * t["x"] + t["xa"]  # total and mid
        attention = t["qkv"] + t["attended"] + t["state"]
        early = t["normed_in"] + t["q"] + t["kv"] + t["rstd_qk"]
        tile, peaks = self._tile(t, tokens), {}
        for level in Level:
            kept = stream + (attention if level >= Level.ATTENTION else 0) + (early if level == Level.ALL else 0)
            if level == Level.ATTENDED:
                kept += t["attended"] + t["state"]
            normed_mid = t["normed_mid"] if level == Level.ALL else 0
            gate_up = t["gate_up"] if level >= Level.GATE_UP else 0
            if tile is t:
                mlp = self._mlp_bytes(t, normed_mid, gate_up)
            else:
                mlp = t["x"] + tile["xa"] + tile["gate_up"] + max(tile["normed_mid"], tile["hidden"])
            peaks[level] = max(stream + attention + early, kept + mlp)
        return peaks

    def _tile(self, t: dict[str, int], tokens: int) -> dict[str, int]:
        """`tensor_bytes` of what a dense layer's second half takes at a time, of `tokens` in all."""
        return t if self.mlp_tile is None or tokens <= self.mlp_tile else self.tensor_bytes(self.mlp_tile)

    def _mlp_bytes(self, t: dict[str, int], normed_mid: int, gate_up: int) -> int:
        """Peak of the forward's second half, beside what a layer keeps of the first; with what it keeps of this one."""
        return max(
            t["normed_mid"] + t["gate_up"],
            normed_mid + t["gate_up"] + t["hidden"],
            normed_mid + gate_up + t["hidden"] + t["x"],
        )

    def backward_bytes(self, t: dict[str, int], tokens: int) -> dict[Level, int]:
        """Peak of a layer's backward by what its forward kept."""
        width, tile = self.shape.intermediate, self._tile(t, tokens)
        products = max(
            4 * self.rank * max(4 * width, 3 * self.shape.qkv_width),
            swiglu_lora_bytes(tokens if tile is t else self.mlp_tile or 0, width, self.rank),
            lora_b_bytes(tokens, [(0, self.shape.hidden)], self.rank),
        )
        rotated = t["q"] + t["kv"] + t["rstd_qk"]
        saved = t["grad"] + t["x"] + t["xa"] + t["qkv"] + t["attended"] + t["state"]
        mlp = saved + t["x"] + tile["normed_mid"] + tile["gate_up"] + tile["grad_hidden"] + products
        attention = saved + rotated + 2 * (t["q"] + t["kv"]) + self.attention_workspace(tokens)
        return backward_peaks(t, mlp, attention)


def backward_peaks(t: dict[str, int], mlp: int, attention: int) -> dict[Level, int]:
    """Peak of a layer's backward by level, of those of its two halves where attention's tensors were kept."""
    rotated = t["q"] + t["kv"] + t["rstd_qk"]
    # An attention that was recomputed leaves as much as one of which all was kept.
    whole = t["normed_in"] + max(mlp + rotated, attention)
    kept = max(mlp, attention)
    # Of an output alone q, k and v are made again when the second half is done.
    attended = max(mlp - t["qkv"], attention + t["normed_in"])
    return {
        Level.INPUT: whole,
        Level.ATTENDED: attended,
        Level.ATTENTION: kept,
        Level.GATE_UP: kept,
        Level.ALL: whole,
    }


@lru_cache
def layer_bytes(work: Workload, tokens: int) -> LayerBytes:
    """Device memory of one layer in a micro-batch."""
    t = work.tensor_bytes(tokens)
    rest = {Level.INPUT: t["xa"], Level.ATTENDED: t["state"], Level.ALL: t["rstd_qk"] + 2 * t["rstd"]}
    parkable, kept = parkable_bytes(t), _by_level(rest)
    saved = {level: parkable[level] + kept[level] for level in Level}
    return LayerBytes(t["x"], saved, parkable, work.forward_bytes(t, tokens), work.backward_bytes(t, tokens))


def _by_level(steps: dict[Level, int]) -> dict[Level, int]:
    """Sum up what each level adds to the one before."""
    return {level: sum(size for step, size in steps.items() if step <= level) for level in Level}


def parkable_bytes(t: dict[str, int]) -> dict[Level, int]:
    """What `Saved.large` names, without the adapters' products and the attention's state."""
    return _by_level(
        {
            Level.INPUT: t["x"],
            Level.ATTENDED: t["attended"],
            Level.ATTENTION: t["qkv"] + t["x"],
            Level.GATE_UP: t["gate_up"],
            Level.ALL: t["q"] + t["kv"] + t["normed_in"] + t["normed_mid"],
        }
    )
