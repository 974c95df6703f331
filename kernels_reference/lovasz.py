"""Lovász losses: the convex extension of the Jaccard loss of a class, by a sort or by bins.

Both are the sum of errors times Jaccard increments. A sort gives every error the increment of its
own rank. Bins give all errors of a bin the increments of its counts, interpolated. No gradient
passes through the increments.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from kernels_reference.base import at_labels, one_hot, over_ranks, sanitised, valid_pixels


def lovasz_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    classes: str | tuple[int, ...] = "present",
    per_image: bool = False,
    ignore_index: int | None = 255,
    exact: bool = False,
    bins: int | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The mean over classes of sum_r e_(r) w_(r), of the errors e = |y - p| from the largest on."""
    logits = at_labels(logits, target, upsample, align_corners)
    pooled = None if per_image else process_group
    count = logits.size(1)
    valid = valid_pixels(target, count, ignore_index)
    p = sanitised(logits, valid).softmax(1)
    own = one_hot(target, count) & valid
    is_number = (p == p).all(1, keepdim=True)
    errors = _grouped(torch.where(own, 1 - p, p), per_image)
    own, counted = _grouped(own, per_image), _grouped(valid & is_number, per_image)

    if exact:
        class_losses = _by_rank(errors, own, counted, counted)
    else:
        bins = 1024 if bins is None else bins
        place, fraction, is_mirrored = _softmax_bins(_grouped(p, per_image).detach(), bins)
        # The error 1 - p lies in the mirrored bin of p.
        place = torch.where(own ^ is_mirrored, 2 * bins - 1 - place, place)
        in_bin = place, torch.where(own ^ is_mirrored, 1 - fraction, fraction)
        class_losses = _by_bin(errors, own, counted, counted, in_bin, softmax_edges(bins), pooled)

    if classes == "present":
        takes_part = _any(own & counted, pooled)
    else:
        chosen = range(count) if classes == "all" else classes
        takes_part = torch.tensor([c in chosen for c in range(count)], device=logits.device)
    mean = _mean(class_losses, takes_part, process_group if per_image else None)
    return _not_a_number_if(valid & ~is_number, mean, process_group)


def lovasz_hinge_loss(
    logits: Tensor,
    target: Tensor,
    *,
    per_image: bool = False,
    ignore_index: int | None = 255,
    exact: bool = False,
    bins: int | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """sum_r max(0, e_(r)) w_(r), of the errors e = 1 - z (2 y - 1) from the largest on."""
    logits = at_labels(logits, target, upsample, align_corners)
    pooled = None if per_image else process_group
    valid = valid_pixels(target, 1, ignore_index)
    valid_own = one_hot(target, 1) & valid
    z = sanitised(logits, valid)
    errors = 1 - torch.where(valid_own, z, -z)
    # -infinity is no error; infinity and NaN make the loss NaN
    is_number = (errors < torch.inf).detach()
    own, counted = _grouped(valid_own, per_image), _grouped(valid & is_number, per_image)
    errors = _grouped(errors, per_image)
    is_error = counted & (errors > 0)

    if exact:
        class_losses = _by_rank(errors, own, counted, is_error)
    else:
        bins = 4096 if bins is None else bins
        in_bin = _hinge_bins(_grouped(1.25 - torch.where(valid_own, z, -z), per_image), bins)
        class_losses = _by_bin(errors, own, counted, is_error, in_bin, hinge_edges(bins), pooled)
    mean = _mean(class_losses, _any(counted, pooled), process_group if per_image else None)
    wrong = valid & ~is_number
    # No number, and neither is the gradient of the wrong pixels; that of others is as it is.
    mean = mean + (torch.where(wrong, z, 0) * torch.where(wrong, torch.nan, 0)).sum()
    return _not_a_number_if(wrong, mean, process_group)


# --- increments -----------------------------------------------------------------------------------


def _by_rank(errors: Tensor, own: Tensor, counted: Tensor, is_error: Tensor) -> Tensor:
    """Of every group and class the sum of errors times the increments of their ranks."""
    key = torch.where(is_error, errors.detach(), -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    own, errors = own & counted, torch.where(is_error, errors, 0)
    increments = jaccard_increments(own.gather(-1, order), own.sum(-1, keepdim=True))
    increments = increments.to(errors.dtype).detach()
    return (errors.gather(-1, order) * increments).sum(-1)


def jaccard_increments(own: Tensor, total: Tensor) -> Tensor:
    """By how much each item adds to the Jaccard loss of those before it, float64.

    Args:
        own: whether items from the largest error down are of the class, [..., items].
        total: how many items of the class there are in all, [..., 1].
    """
    found = own.cumsum(-1)
    others = torch.arange(1, own.size(-1) + 1, device=own.device) - found
    union = (total + others).double()
    increments = torch.where(
        own, 1 / union, (total - found) / (union * torch.where(own, 1, union - 1))
    )
    return torch.where(total > 0, increments, (others == 1).double())


def _by_bin(
    errors: Tensor,
    own: Tensor,
    counted: Tensor,
    is_error: Tensor,
    in_bin: tuple[Tensor, Tensor],
    edges: Tensor,
    process_group: ProcessGroup | None,
) -> Tensor:
    """Of every group and class the integral of the Jaccard loss of the errors above a threshold.

    Args:
        errors: [groups, classes, pixels].
        own: whether a pixel is of the class.
        counted: whether a pixel is counted.
        is_error: whether its error is, too; of the class all pixels that are counted have a part in
            the union.
        in_bin: the bin of every error, and where in it the error lies, from 0 to 1.
        edges: of the bins, [bins + 1], from the smallest error up.
        process_group: whose ranks' errors are counted together, or None.
    """
    place, fraction = in_bin
    bins = edges.numel() - 1
    edges = edges.to(errors)
    is_error = is_error.expand_as(errors)
    shape = (*errors.shape[:2], bins)
    of_class, of_others = (
        _of_all_ranks(
            torch.zeros(shape, dtype=torch.int64, device=errors.device).scatter_add(
                -1, place.expand_as(errors), (is_error & which).long()
            ),
            process_group,
        )
        for which in (own, ~own)
    )
    total = _of_all_ranks((own & counted).sum(-1, keepdim=True), process_group).to(errors)
    low, high = _line(of_class.to(errors), of_others.to(errors), total)

    # the value: the area below the Jaccard loss, whose values at the edges are exact
    found, others = (counts.flip(-1).cumsum(-1).flip(-1) for counts in (of_class, of_others))
    at_edges = torch.nn.functional.pad((found + others) / (total + others).clamp(min=1), (0, 1))
    value = ((at_edges[..., 1:] + at_edges[..., :-1]) / 2 * edges.diff()).sum(-1).to(errors)

    # the gradient: increments at the edges of the error's bin, interpolated
    where = place.expand_as(errors)
    at_low, at_high = (
        torch.where(own, of_own.gather(-1, where), of_rest.gather(-1, where))
        for of_own, of_rest in (low, high)
    )
    increments = torch.where(is_error, at_low + fraction.to(errors) * (at_high - at_low), 0)
    weighted = (torch.where(is_error, errors, 0) * increments).sum(-1)
    if process_group is not None:  # DistributedDataParallel divides by the number of ranks
        weighted = process_group.size() * weighted
    return weighted + (value - weighted).detach()


def _line(of_class: Tensor, of_others: Tensor, total: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Increments at the lower and the upper edge of every bin, of the class and of the others.

    Between the edges they are a line whose mean is what the counts say: over n others in a bin the
    increments add up to the fall of the Jaccard loss, so that few errors get what ranks would give.
    """

    def above(counts: Tensor) -> Tensor:
        return counts.flip(-1).cumsum(-1).flip(-1) - counts

    missed_high = total - above(of_class)  # of the class, with smaller errors
    union_high = (total + above(of_others)).clamp(min=1)
    missed_low, union_low = missed_high - of_class, union_high + of_others
    several = of_others.clamp(min=1)

    own_mean = torch.where(
        of_others > 0, (of_others / union_high).log1p() / several, 1 / union_high
    )
    own_rise = torch.minimum(1 / union_high - 1 / union_low, 2 * own_mean)
    mean = (missed_low + missed_high) / 2 / (union_low * union_high)
    rise = missed_high / union_high**2 - missed_low / union_low**2
    rise = torch.minimum(rise * (several - 1) / several, 2 * mean)
    # Of a class that is nowhere only the largest error counts.
    is_top = (of_others > 0) & (above(of_others) == 0)
    mean = torch.where(total > 0, mean, torch.where(is_top, 1 / several, 0))
    rise = torch.where(total > 0, rise, 0)
    return (own_mean - own_rise / 2, mean - rise / 2), (own_mean + own_rise / 2, mean + rise / 2)


# --- bins -----------------------------------------------------------------------------------------
# In float32 whatever the dtype: the same bins as those of the kernels.


def _softmax_bins(p: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """(bin of min(p, 1 - p), where in it that lies, whether p is the larger of the two).

    From 0 to 1/2 there are ``bins`` bins: above 1/32 of the width 1 / bins, below it bins / 32 for
    each of 17 powers of two.
    """
    # 1 but for the last digit of a float32 number: 1/2 itself is within the last bin.
    nearest = torch.minimum(p, 1 - 2.0**-24 - p).float().nan_to_num(0).clamp(2.0**-22, 0.5)
    power, fraction = _powers(nearest, bins // 32)
    linear = nearest * bins
    place = torch.where(nearest < 1 / 32, power + 22 * (bins // 32), linear.long() + bins // 2)
    fraction = torch.where(nearest < 1 / 32, fraction, linear - linear.floor())
    return place.clamp(max=bins - 1), fraction, p >= 0.5


def softmax_edges(bins: int) -> Tensor:
    """The edges of the bins from 0 to 1, float64 [2 * bins + 1]."""
    step = torch.arange(bins + 1, dtype=torch.float64)
    each = bins // 32
    power = torch.exp2(step // each - 22) * (1 + step % each / each)
    edges = torch.where(step < 17 * each, power, (step - bins / 2) / bins)
    edges[0] = 0
    return torch.cat((edges[:-1], 1 - edges.flip(0)))


def _hinge_bins(shifted: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(bin of the error, where in it that lies), of the error and 1/4.

    bins / 16 for each of 12 powers of two, and for those from 2^10 on a 32nd of that.
    """
    each = bins // 16
    shifted = shifted.detach().float().nan_to_num(0).clamp(0.25, torch.finfo(torch.float32).max)
    power, fraction = _powers(shifted, each)
    far_power, far_fraction = _powers(shifted, each // 32)
    is_far = shifted >= 2.0**10
    place = torch.where(is_far, far_power - 10 * (each // 32) + 12 * each, power + 2 * each)
    return place, torch.where(is_far, far_fraction, fraction)


def hinge_edges(bins: int) -> Tensor:
    """The edges of the bins from 0 up, float64 [bins + 1]."""
    each = bins // 16
    step = torch.arange(bins + 1, dtype=torch.float64)
    power = torch.exp2(step // each - 2) * (1 + step % each / each)
    beyond, far = step - 12 * each, each // 32
    far_power = torch.exp2(beyond // far + 10) * (1 + beyond % far / far)
    edges = torch.where(beyond < 0, power, far_power) - 0.25
    return edges.clamp(max=torch.finfo(torch.float32).max)  # the last bins have no width


def _powers(x: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """(bin, where in it), of ``each`` bins of one width for a power of two; 1 begins bin 0."""
    mantissa, exponent = torch.frexp(x)
    steps = (2 * mantissa - 1) * each
    return (exponent.long() - 1) * each + steps.long(), steps - steps.floor()


# --- groups and means -----------------------------------------------------------------------------


def _grouped(maps: Tensor, per_image: bool) -> Tensor:
    """[N, C, ...] as [groups, C, pixels]: a group is an image, or all of them."""
    flat = maps.flatten(2)
    return flat if per_image else flat.transpose(0, 1).flatten(1).unsqueeze(0)


def _mean(class_losses: Tensor, takes_part: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The mean over groups of the mean over the classes that take part; 0 where none does.

    The groups are those of all ranks of a process group.
    """
    takes_part = takes_part.expand_as(class_losses)
    of_groups = torch.where(takes_part, class_losses, 0).sum(-1) / takes_part.sum(-1).clamp(min=1)
    number = of_groups.new_tensor(of_groups.numel())
    total = over_ranks(of_groups.sum(), process_group)
    return total / over_ranks(number, process_group).clamp(min=1)


def _not_a_number_if(is_wrong: Tensor, loss: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The loss, or NaN; its gradient is there all the same."""
    wrong = _of_all_ranks(is_wrong.sum(), process_group)
    return loss + torch.where(wrong > 0, torch.nan, 0).to(loss)


def _any(counted: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Whether any pixel of any rank is counted, [groups, classes]."""
    return _of_all_ranks(counted.sum(-1), process_group) > 0


def _of_all_ranks(counts: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """The sum over all ranks of counts, which have no gradient."""
    if process_group is not None:
        all_reduce(counts, group=process_group)
    return counts
