"""Other people's implementations of the same formulas, as providers of the report.

An adapter imports its library when it is called, so that a library that is not installed is left
out by name, and raises UnknownCaseError for what the library does not have, or computes
differently. No library is timed whose values and gradients have not passed the parity gate.

| operation | library | its formula is the same for |
|---|---|---|
| ssim | pytorch-msssim | window 11, padding "valid" |
| ssim | fused-ssim | window 11, float32, padding "zeros" and "valid" |
| ssim | kornia | any window, padding "reflect" and "valid"; also the map |
| ssim | MONAI | any window, padding "valid" |

Not adapted: kornia's and MONAI's losses other than these, and segmentation-models-pytorch, which
have none of the formulas of the structural losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from perf.operations.contract import Operation, Outputs, UnknownCaseError

Loader = Callable[[], Callable[..., Outputs]]


def _pytorch_msssim() -> Callable[..., Tensor]:
    from pytorch_msssim import ssim

    def similarity(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        _only(options, window_size=(11,), padding=("valid",), reduction=("mean",))
        return ssim(x, y, data_range=1.0)

    return similarity


def _fused_ssim() -> Callable[..., Tensor]:
    from fused_ssim import fused_ssim

    def similarity(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        _only(options, window_size=(11,), padding=("zeros", "valid"), reduction=("mean",))
        if x.dtype != torch.float32:
            raise UnknownCaseError
        return fused_ssim(x, y, padding="valid" if options.get("padding") == "valid" else "same")

    return similarity


def _kornia() -> Callable[..., Tensor]:
    from kornia.metrics import ssim

    def similarity(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        _only(options, padding=("reflect", "valid"), reduction=("mean", "none"))
        padding = "valid" if options["padding"] == "valid" else "same"
        values = ssim(x, y, options.get("window_size", 11), max_val=1.0, eps=0.0, padding=padding)
        return values if options.get("reduction") == "none" else values.mean()

    return similarity


def _monai() -> Callable[..., Tensor]:
    from monai.losses import SSIMLoss

    def similarity(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        _only(options, padding=("valid",), reduction=("mean",))
        if x.dtype != torch.float32:  # it computes and answers in float32
            raise UnknownCaseError
        loss = SSIMLoss(spatial_dims=2, win_size=options.get("window_size", 11))
        return 1 - loss(x, y)

    return similarity


def _only(options: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    """Refuse options that the library does not have; what is not given has its default."""
    asked = {"window_size": 11, "padding": "zeros", "reduction": "mean", **options}
    if asked.keys() > {"window_size", "padding", "reduction"}:
        raise UnknownCaseError
    if any(asked[name] not in values for name, values in known.items()):
        raise UnknownCaseError


SSIM: Mapping[str, Loader] = {
    "fused-ssim": _fused_ssim,
    "kornia": _kornia,
    "MONAI": _monai,
    "pytorch-msssim": _pytorch_msssim,
}


def absent(chosen: Iterable[Operation]) -> list[str]:
    """Names of the libraries that the operations know and that are not installed."""
    missing = []
    for operation in chosen:
        for name, load in operation.libraries.items():
            try:
                load()
            except ImportError:
                missing.append(name)
    return sorted(set(missing), key=str.lower)
