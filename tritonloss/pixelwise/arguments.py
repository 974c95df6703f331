"""The arguments that all pixelwise losses have around their own: how they are checked and kept.

They are ``ignore_index``, ``reduction``, ``upsample``, ``align_corners`` and ``process_group``.
Here they come by these names, as ``common``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._core import checks
from .._core.process_groups import check_process_group, name_of
from .._engine.pixel_terms import REDUCTIONS


def check_maps(logits: torch.Tensor, target: torch.Tensor, common: Mapping[str, Any]) -> None:
    """Check logits and labels, but for what the labels are."""
    checks.check_logits(logits)
    checks.check_upsample(common["upsample"], common["align_corners"])
    checks.check_target(logits, target, common["upsample"], can_upsample=True)


def check_common(common: Mapping[str, Any], classes: int | None) -> None:
    """Check all of them; without ``classes``, for any number of classes."""
    checks.check_ignore_index(common["ignore_index"], classes)
    checks.check_option("reduction", common["reduction"], REDUCTIONS)
    checks.check_upsample(common["upsample"], common["align_corners"])
    check_process_group(common["process_group"], common["reduction"])


def options_of(common: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an operator's options that say the same."""
    return {
        "ignore_index": checks.plain_label(common["ignore_index"]),
        "reduction": common["reduction"],
        "upsample": common["upsample"],
        "align_corners": common["align_corners"],
        "group": name_of(common["process_group"]),
    }
