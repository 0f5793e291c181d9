"""A mixture of experts as the planner sees it: what differs from a dense model (workload.py) in bytes on the device."""

from dataclasses import dataclass

from finemill.kernels.engine.plan import ExpertShape, Level
from finemill.kernels.ops.division import PAD, capacity, cdiv, choose_block, lora_b_bytes
from finemill.kernels.planning.workload import NF4_BYTES, Workload, backward_peaks, block_bytes

# T tokens, R rows of pairs of a token and an expert, E experts


@dataclass(frozen=True)
class MixtureWorkload(Workload):
    """A model whose layers are mixtures of experts, and a step.

    Args:
        expert_rank: LoRA rank of every expert; 0 where experts have no adapters.
    """

    expert_rank: int = 0

    @property
    def experts(self) -> ExpertShape:
        """The mixture."""
        experts = self.shape.experts
        assert experts is not None
        return experts

    @property
    def attention_weights(self) -> int:
        """Elements of attention's four matrices."""
        return self.shape.hidden * (self.shape.qkv_width + self.shape.q_width)

    @property
    def expert_weights(self) -> int:
        """Elements of a layer's experts."""
        return 3 * self.experts.count * self.shape.hidden * self.experts.intermediate

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's quantized matrices: the router is none."""
        return self.attention_weights + self.expert_weights

    @property
    def router_bytes(self) -> int:
        """Device memory of all routers."""
        return 2 * self.num_layers * self.experts.count * self.shape.hidden

    @property
    def nf4_bytes(self) -> int:
        """Device memory of a layer's quantized matrices: gate and up of all experts are one tensor."""
        s = self.shape
        kv = s.num_kv_heads * s.head_dim
        attention = sum(block_bytes(n * s.hidden // 2) for n in (s.q_width, kv, kv, s.q_width))
        third = self.expert_weights // 3
        return attention + block_bytes(third) + block_bytes(third // 2) + int(self.layer_weights * (NF4_BYTES - 0.5))

    @property
    def pads(self) -> tuple[int, ...]:
        """Spare columns of qkv and o; experts have none."""
        return *(cdiv(members * self.rank, PAD) * PAD for members in (3, 1)), 0, 0

    @property
    def _attention_bytes(self) -> int:
        """Device memory of attention's two extended 16-bit weights."""
        s, (qkv_pad, o_pad, *_) = self.shape, self.pads
        shapes = ((s.qkv_width + qkv_pad, s.hidden + qkv_pad), (s.hidden + o_pad, s.q_width + o_pad))
        return sum(block_bytes(2 * rows * columns) for rows, columns in shapes)

    @property
    def extended_bytes(self) -> int:
        """Device memory of a layer's 16-bit weights."""
        third = 2 * self.expert_weights // 3
        return self._attention_bytes + block_bytes(2 * third) + block_bytes(third)

    @property
    def scratch_bytes(self) -> int:
        """Device memory of the buffers that weights are decoded into: one for both stacks of experts."""
        return self._attention_bytes + block_bytes(4 * self.expert_weights // 3)

    @property
    def most_parked(self) -> Level:
        """The highest level whose tensors may wait in host memory: rows of experts are too many for the bus."""
        return Level.ATTENTION

    @property
    def adapter_elements(self) -> int:
        """Elements of all LoRA matrices."""
        s, e = self.shape, self.experts
        attention = self.rank * (s.qkv_width + s.hidden + 3 * s.hidden + s.q_width)
        experts = self.expert_rank * e.count * (2 * s.hidden + 3 * e.intermediate)
        return (attention + experts) * self.num_layers

    def static_bytes(self) -> int:
        """Weights, adapters, gradient and optimizer states."""
        return super().static_bytes() + self.router_bytes

    def loading_bytes(self) -> int:
        """What loading the whole base onto the device takes, a layer's experts on their way from 16 bits to NF4."""
        return super().loading_bytes() + self.router_bytes + 2 * self.expert_weights

    def rows(self, tokens: int) -> int:
        """R of a micro-batch."""
        e = self.experts
        return capacity(tokens, e.per_token, e.count, choose_block(tokens, e.per_token, e.count))

    @property
    def _columns(self) -> int:
        """Columns of a product with an expert's A."""
        return cdiv(self.expert_rank, 16) * 16

    @property
    def widths(self) -> dict[str, int]:
        """Bytes per token of what a layer computes, under the names of decoder_layer.py and experts.py."""
        e = self.experts
        routing = 16 * e.per_token + (0 if e.normalize else 4 * e.count)
        return super().widths | {
            "xa": 2 * 4 * self.rank + 2 * e.per_token * self._columns + routing,
            "gate_up": 2 * e.per_token * 2 * e.intermediate,
            "hidden": 2 * e.per_token * e.intermediate,
            "grad_hidden": 2 * e.per_token * e.intermediate,
            "rows": 2 * e.per_token * self.shape.hidden,
            "logits": 4 * e.count,
        }

    def tensor_bytes(self, tokens: int) -> dict[str, int]:
        """Device memory of what a layer computes."""
        e, s, rows, columns = self.experts, self.shape, self.rows(tokens), self._columns
        pairs = tokens * e.per_token
        copies = 2 * e.count * columns
        return super().tensor_bytes(tokens) | {
            "xa": 8 * self.rank * tokens
            + 2 * rows * columns
            + 12 * pairs
            + 4 * rows
            + (0 if e.normalize else 4 * e.count * tokens),
            "low": 2 * rows * columns,
            "row_values": 4 * rows,
            "gate_up": block_bytes(4 * rows * e.intermediate),
            "hidden": block_bytes(2 * rows * e.intermediate),
            "rows": block_bytes(2 * rows * s.hidden),
            "first_factors": copies * (s.hidden + 2 * e.intermediate),
            "second_factors": copies * (e.intermediate + s.hidden),
        }

    def _mlp_bytes(self, t: dict[str, int], normed_mid: int, gate_up: int) -> int:
        """Peak of the forward's second half, which holds the adapters' 16-bit copies and the experts' answers."""
        first, second = t["first_factors"], t["second_factors"]
        return max(
            t["normed_mid"] + first + t["rows"] + t["low"] + t["gate_up"],
            normed_mid + gate_up + t["hidden"] + first + second + t["rows"],
            normed_mid + gate_up + second + t["rows"] + t["x"],
        )

    def backward_bytes(self, t: dict[str, int], tokens: int) -> dict[Level, int]:
        """Peak of a layer's backward by what its forward kept."""
        products = max(12 * self.rank * self.shape.qkv_width, lora_b_bytes(tokens, [(0, self.shape.hidden)], self.rank))
        rotated = t["q"] + t["kv"] + t["rstd_qk"]
        saved = t["grad"] + t["x"] + t["xa"] + t["qkv"] + t["attended"] + t["state"]
        rows = t["rows"] + t["gate_up"] + t["hidden"] + 4 * t["low"] + 4 * t["row_values"]
        mlp = saved + t["x"] + t["normed_mid"] + rows + t["first_factors"] + t["second_factors"]
        attention = saved + rotated + 2 * (t["q"] + t["kv"]) + max(products, self.attention_workspace(tokens))
        return backward_peaks(t, mlp, attention)
