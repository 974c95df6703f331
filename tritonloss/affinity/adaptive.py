"""Adaptive affinity fields: the sizes are weighted by class, by weights that oppose the network."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup

from .._core import checks
from .affinity_field import affinity_field_loss, check_options, check_sizes


class AdaptiveAffinityFieldLoss(nn.Module):
    """Affinity field loss of several sizes, whose weights are learnt for every class.

    The weights of a centre pixel's class are a softmax over the sizes, one for its edges and one
    for its other entries. They are trained to make the loss larger, so that each class is held to
    the size where it does worst: their gradient is reversed in here. The parameters go into the
    network's optimizer with all others, and nothing else is to be done with them.

    Args:
        classes: C, the number of classes, at least 2.
        sizes: how far neighbours are apart, a number from 1 to 64 or a tuple of different ones.
            Default (1, 2, 3).
        margin: the divergence from which on an edge costs nothing. Default 3.
        edge_weight: of the edges' means. Default 1.
        non_edge_weight: of the other entries' means. Default 1.
        decay: what the loss is multiplied by; set ``criterion.decay`` to
            10 ** (-step / steps) at every step to train as in the paper. Default 1.
        void: "triple" (default) or "pair", as in the function.
        ignore_index: label of pixels that are void, as in the function. Default 255.
        process_group: the ranks whose images are one batch with these, as in the function. The
            scores' gradients are, as the logits', those of the whole batch once
            DistributedDataParallel has taken their mean over the ranks. Default None.

    Attributes:
        edge_scores: the parameter [C, sizes] whose softmax weights the edges; 0 at first.
        non_edge_scores: the same of other entries.

    Reference:
        Ke et al., "Adaptive Affinity Fields for Semantic Segmentation", Eq. 7 to 9.

    Example:
        >>> import torch, tritonloss
        >>> criterion = tritonloss.AdaptiveAffinityFieldLoss(19)
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)
        >>> criterion(logits, torch.randint(0, 19, (2, 32, 64))).backward()
        >>> criterion.edge_scores.grad.shape
        torch.Size([19, 3])
    """

    def __init__(
        self,
        classes: int,
        *,
        sizes: int | tuple[int, ...] = (1, 2, 3),
        margin: float = 3.0,
        edge_weight: float = 1.0,
        non_edge_weight: float = 1.0,
        decay: float = 1.0,
        void: str = "triple",
        ignore_index: int | None = checks.IGNORE_INDEX,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        checks.check_integer("classes", classes, 2, 2**31 - 1)
        check_sizes(sizes, "sizes")
        check_options(
            size=sizes,
            margin=margin,
            edge_weight=edge_weight,
            non_edge_weight=non_edge_weight,
            edge_table=None,
            non_edge_table=None,
            decay=decay,
            void=void,
            ignore_index=ignore_index,
            process_group=process_group,
        )
        checks.check_ignore_index(ignore_index, classes)
        self.sizes = sizes if isinstance(sizes, tuple) else (sizes,)
        self.margin, self.decay = margin, decay
        self.edge_weight, self.non_edge_weight = edge_weight, non_edge_weight
        self.void, self.ignore_index = void, ignore_index
        self.process_group = process_group
        self.edge_scores = nn.Parameter(torch.zeros(classes, len(self.sizes)))
        self.non_edge_scores = nn.Parameter(torch.zeros(classes, len(self.sizes)))

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of logits [N, C, H, W] and labels [N, H, W], a scalar."""
        classes = self.edge_scores.size(0)
        if isinstance(logits, torch.Tensor) and logits.dim() == 4 and logits.size(1) != classes:
            raise ValueError(
                f"logits must have {classes} classes, as the loss was made for; "
                f"got {checks.described(logits)}"
            )
        return affinity_field_loss(
            logits,
            target,
            size=self.sizes,
            margin=self.margin,
            edge_weight=self.edge_weight,
            non_edge_weight=self.non_edge_weight,
            edge_table=_opposed(self.edge_scores.softmax(1)),
            non_edge_table=_opposed(self.non_edge_scores.softmax(1)),
            decay=self.decay,
            void=self.void,
            ignore_index=self.ignore_index,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        names = ("sizes", "margin", "edge_weight", "non_edge_weight", "decay", "void")
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.edge_scores.size(0)}, {shown}, ignore_index={self.ignore_index!r}"


def _opposed(weights: torch.Tensor) -> torch.Tensor:
    """The same weights, with the opposite gradient."""
    return 2 * weights.detach() - weights
