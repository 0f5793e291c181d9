"""What a layer's forward leaves for its backward."""

from dataclasses import dataclass, field

from torch import Tensor

from finemill.kernels.engine.plan import Level
from finemill.kernels.ops.expert_rows import ExpertRows

# T tokens, H model width, I feed-forward width, N query heads, D head width, P spare columns


@dataclass(frozen=True)
class Routing:
    """Each token's experts (T, k), their weights (T, k) fp32, where the pairs lie, and the logits (T, E) if needed."""

    experts: Tensor
    weights: Tensor
    rows: ExpertRows
    logits: Tensor | None


@dataclass
class Saved:
    """What a layer's forward leaves for its backward; fields a level drops are None until recomputed.

    `normed_in` and `normed_mid` are extended inputs (T, H + P); `attended` (T, N D + P) and `gate_up` (T, 2I + P)
    carry the extension columns that the backward fills. Of experts, `gate_up` (R, 2I) and `xa_down` (R, r) have a row
    for each pair of a token and an expert, and `routing` says where.
    """

    level: Level
    x: Tensor
    xa_qkv: Tensor
    xa_o: Tensor
    xa_gate_up: Tensor = field(init=False)
    xa_down: Tensor = field(init=False)
    qkv: Tensor | None = None
    attended: Tensor | None = None
    attention_state: tuple[Tensor, ...] = ()
    mid: Tensor | None = None
    gate_up: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    rstd_qk: Tensor | None = None
    normed_in: Tensor | None = None
    rstd_in: Tensor | None = None
    normed_mid: Tensor | None = None
    rstd_mid: Tensor | None = None
    routing: Routing | None = None

    def of_rows(self, rows: slice) -> "Saved":
        """The part of some tokens, as far as a dense second half's backward needs it: views."""
        part = Saved(Level.INPUT, self.x[rows], self.xa_qkv[rows], self.xa_o[rows])
        part.xa_gate_up, part.xa_down = self.xa_gate_up[rows], self.xa_down[rows]
        part.mid = None if self.mid is None else self.mid[rows]
        return part

    def large(self, level: Level) -> list[str]:
        """Names of the kept tensors up to a level that are worth moving to host memory."""
        names = {
            Level.INPUT: ("x",),
            Level.ATTENDED: ("attended",),
            Level.ATTENTION: ("qkv", "mid"),
            Level.GATE_UP: ("gate_up",),
            Level.ALL: ("q", "k", "normed_in", "normed_mid"),
        }
        wanted = (name for step, group in names.items() if step <= level for name in group)
        return [name for name in wanted if getattr(self, name) is not None]
