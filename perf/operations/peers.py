"""Other people's implementations of the same formulas, as providers of the report.

An adapter imports its library when it is called, so that a library that is not installed is left
out by name, and raises UnknownCaseError for what the library does not have, or computes
differently. No library is timed whose values and gradients have not passed the parity gate.

Of segmentation-models-pytorch only the losses are imported, which need PyTorch alone. Its networks
need torchvision, whose published wheel does not load beside a PyTorch without CUDA. For the same
reason it is not in the extra `dev`: `make` installs it without what it depends on.

| operation | library | its formula is the same for |
|---|---|---|
| cross_entropy | segmentation-models-pytorch | float32, with and without label smoothing |
| binary_cross_entropy | segmentation-models-pytorch | float32, several classes |
| focal_loss | kornia, MONAI | float32, the softmax's; the mean over valid pixels |
| dice_loss | MONAI | float32, the softmax's; of its losses of classes the mean of those present |
| confusion_matrix | torchmetrics | several classes, logits or labels |
| ssim | pytorch-msssim | window 11, padding "valid" |
| ssim | fused-ssim | window 11, float32, padding "zeros" and "valid" |
| ssim | kornia | any window, padding "reflect" and "valid"; also the map |
| ssim | MONAI | any window, padding "valid" |

Each operation is also compared with PyTorch's own where PyTorch has one. The focal loss of
segmentation-models-pytorch (a sigmoid for each class) is not adapted, since its formula is another
one. kornia and MONAI have no cross entropy of their own. None of the libraries has the structural
losses, RMI or margin calibration: these are compared with the papers' own code as
kernels_reference restates it, which is eager.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
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


def _smp_cross_entropy() -> Callable[..., Tensor]:
    smp = _part_of("segmentation_models_pytorch", "losses")

    def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        _same_formula(logits, options, "label_smoothing")
        summed = smp.SoftCrossEntropyLoss("sum", options.get("label_smoothing", 0.0), _IGNORED)
        return summed(logits, target.long()) / _valid(target).sum()

    return loss


def _smp_binary_cross_entropy() -> Callable[..., Tensor]:
    smp = _part_of("segmentation_models_pytorch", "losses")
    summed = smp.SoftBCEWithLogitsLoss(ignore_index=_IGNORED, reduction="sum")

    def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        _same_formula(logits, options)
        if logits.size(1) == 1:
            raise UnknownCaseError
        valid = _valid(target)
        own = torch.where(valid, target, 0).long()
        labels = torch.nn.functional.one_hot(own, logits.size(1)).movedim(-1, 1).to(logits)
        return summed(logits, torch.where(valid[:, None], labels, _IGNORED)) / valid.sum()

    return loss


def _kornia_focal() -> Callable[..., Tensor]:
    kornia = _imported("kornia.losses")

    def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        _same_formula(logits, options, "gamma")
        summed = kornia.focal_loss(
            logits, target.long(), None, options.get("gamma", 2.0), "sum", ignore_index=_IGNORED
        )
        return summed / _valid(target).sum()

    return loss


def _monai_focal() -> Callable[..., Tensor]:
    monai = _imported("monai.losses")

    def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        _same_formula(logits, options, "gamma")
        mean = monai.FocalLoss(
            to_onehot_y=True, use_softmax=True, gamma=options.get("gamma", 2.0),
            ignore_index=_IGNORED,
        )  # fmt: skip
        return mean(logits, target.long()[:, None])

    return loss


def _monai_dice() -> Callable[..., Tensor]:
    monai = _imported("monai.losses")
    of_classes = monai.DiceLoss(batch=True, reduction="none", smooth_nr=1e-5, smooth_dr=1e-5)

    def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        _same_formula(logits, options)
        valid = _valid(target)
        own = torch.where(valid, target, 0).long()
        labels = torch.nn.functional.one_hot(own, logits.size(1)).movedim(-1, 1)
        labels = labels * valid[:, None]
        values = of_classes(logits.softmax(1) * valid[:, None], labels).flatten()
        present = labels.sum((0, 2, 3)) > 0
        return torch.where(present, values, 0).sum() / present.sum()

    return loss


_IGNORED = 255


def _imported(name: str) -> Any:
    """The module of that name.

    Raises:
        ImportError: it is not installed, or what it stands on does not fit this PyTorch.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        raise ImportError(f"{name}: {error}") from error


def _part_of(package: str, part: str) -> Any:
    """A subpackage that imports nothing of its package, which is not imported either.

    Raises:
        ImportError: the package is not installed, or has no such part.
    """
    name = f"_{part}_of_{package}"
    if name not in sys.modules:
        found = importlib.util.find_spec(package)
        places = found.submodule_search_locations if found else None
        spec = importlib.machinery.PathFinder.find_spec(part, places) if places else None
        if spec is None or spec.origin is None:
            raise ImportError(f"No module named '{package}.{part}'")
        again = importlib.util.spec_from_file_location(name, spec.origin)
        assert again is not None and again.loader is not None
        module = importlib.util.module_from_spec(again)
        sys.modules[name] = module
        try:
            again.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _valid(target: Tensor) -> Tensor:
    return target != _IGNORED


def _same_formula(logits: Tensor, options: Mapping[str, Any], *known: str) -> None:
    """Refuse other options, and logits of a narrow dtype, in which the library would add up."""
    if options.keys() - set(known) or logits.dtype not in (torch.float32, torch.float64):
        raise UnknownCaseError


def _torchmetrics() -> Callable[..., Tensor]:
    functional = _imported("torchmetrics.functional.classification")

    def matrix(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        if options or logits.size(1) == 1:
            raise UnknownCaseError
        found: Tensor = functional.multiclass_confusion_matrix(
            logits, target.long(), logits.size(1), ignore_index=_IGNORED, validate_args=False
        )
        return found

    return matrix


def _only(options: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    """Refuse options that the library does not have; what is not given has its default."""
    asked = {"window_size": 11, "padding": "zeros", "reduction": "mean", **options}
    if asked.keys() > {"window_size", "padding", "reduction"}:
        raise UnknownCaseError
    if any(asked[name] not in values for name, values in known.items()):
        raise UnknownCaseError


CROSS_ENTROPY: Mapping[str, Loader] = {"segmentation-models-pytorch": _smp_cross_entropy}
BINARY_CROSS_ENTROPY: Mapping[str, Loader] = {
    "segmentation-models-pytorch": _smp_binary_cross_entropy
}
CONFUSION_MATRIX: Mapping[str, Loader] = {"torchmetrics": _torchmetrics}
DICE_LOSS: Mapping[str, Loader] = {"MONAI": _monai_dice}
FOCAL_LOSS: Mapping[str, Loader] = {"kornia": _kornia_focal, "MONAI": _monai_focal}
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
