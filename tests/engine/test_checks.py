"""What a refusal says, and which labels are checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tritonloss._core import checks

LOGITS = torch.zeros(2, 19, 4, 6)
TARGET = torch.zeros(2, 4, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (
            lambda: checks.check_logits([1.0]),
            TypeError,
            "logits must be a float16, bfloat16, float32 or float64 tensor of shape (N, C, H, W); "
            "got list",
        ),
        (
            lambda: checks.check_logits(LOGITS.int(), name="x"),
            TypeError,
            "x must be a float16, bfloat16, float32 or float64 tensor of shape (N, C, H, W); "
            "got int32 of shape (2, 19, 4, 6)",
        ),
        (
            lambda: checks.check_logits(LOGITS[0]),
            ValueError,
            "logits must be a float16, bfloat16, float32 or float64 tensor of shape (N, C, H, W) "
            "with C of at least 1; got float32 of shape (19, 4, 6)",
        ),
        (
            lambda: checks.check_target(LOGITS, TARGET.float()[:, None]),
            TypeError,
            "target must hold integer labels of shape (2, 4, 6) to match logits of shape "
            "(2, 19, 4, 6); got float32 of shape (2, 1, 4, 6)",
        ),
        (
            lambda: checks.check_target(LOGITS, TARGET.bool()),
            TypeError,
            "target must hold integer labels of shape (2, 4, 6) to match logits of shape "
            "(2, 19, 4, 6); got bool of shape (2, 4, 6)",
        ),
        (
            lambda: checks.check_target(LOGITS, TARGET[:, :2]),
            ValueError,
            "target must hold integer labels of shape (2, 4, 6) to match logits of shape "
            "(2, 19, 4, 6); got uint8 of shape (2, 2, 6)",
        ),
        (
            lambda: checks.check_target(LOGITS, TARGET.to("meta")),
            ValueError,
            "target must be on the device of logits, cpu; got meta",
        ),
        (
            lambda: checks.check_images(LOGITS, LOGITS.half()),
            TypeError,
            "y must be like x, float32 of shape (2, 19, 4, 6); got float16 of shape (2, 19, 4, 6)",
        ),
        (
            lambda: checks.check_images(LOGITS, LOGITS[:1]),
            ValueError,
            "y must be like x, float32 of shape (2, 19, 4, 6); got float32 of shape (1, 19, 4, 6)",
        ),
        (
            lambda: checks.check_window_size(4),
            ValueError,
            "window_size must be an odd integer from 1 to 31; got 4",
        ),
        (
            lambda: checks.check_window_size(33),
            ValueError,
            "window_size must be an odd integer from 1 to 31; got 33",
        ),
        (
            lambda: checks.check_window_size(3.0),
            TypeError,
            "window_size must be an odd integer from 1 to 31; got 3.0 of type float",
        ),
        (
            lambda: checks.check_padding_fits(LOGITS, 11, "reflect"),
            ValueError,
            'logits must have height and width of at least 6 for padding="reflect" and '
            "window_size=11; got height 4 and width 6",
        ),
        (
            lambda: checks.check_padding_fits(LOGITS, 5, "valid", name="x"),
            ValueError,
            'x must have height and width of at least 5 for padding="valid" and '
            "window_size=5; got height 4 and width 6",
        ),
        (
            lambda: checks.check_option("padding", "same", ("zeros", "valid")),
            ValueError,
            "padding must be one of 'zeros', 'valid'; got 'same'",
        ),
        (
            lambda: checks.check_option("padding", 0, ("zeros", "valid")),
            TypeError,
            "padding must be one of 'zeros', 'valid'; got 0 of type int",
        ),
        (
            lambda: checks.check_range("beta", 1.5, 0, 1),
            ValueError,
            "beta must be a number in [0, 1]; got 1.5",
        ),
        (
            lambda: checks.check_range("sigma", 0, 0, float("inf"), interval="()"),
            ValueError,
            "sigma must be a number in (0, inf); got 0",
        ),
        (
            lambda: checks.check_range("beta", float("nan"), 0, 1),
            ValueError,
            "beta must be a number in [0, 1]; got nan",
        ),
        (
            lambda: checks.check_range("beta", "0.1", 0, 1),
            TypeError,
            "beta must be a number in [0, 1]; got '0.1' of type str",
        ),
        (
            lambda: checks.check_flag("reweight", 1),
            TypeError,
            "reweight must be True or False; got 1 of type int",
        ),
        (
            lambda: checks.check_ignore_index(255.0),
            TypeError,
            "ignore_index must be an integer or None; got 255.0 of type float",
        ),
    ],
)
def test_a_refusal_names_argument_accepted_and_given(
    check: Callable[[], None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as refusal:
        check()
    assert str(refusal.value) == message


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_outside_are_named_and_counted(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 1, 2, 2, 7, 255], dtype=torch.int64).to(dtype)
    with pytest.raises(ValueError) as refusal:
        checks.check_labels_in_range(target, 2, 255)
    assert str(refusal.value) == (
        "target must hold labels from 0 to 1 or ignore_index=255; got 3 labels outside: "
        "2 (2x), 7 (1x)"
    )


def test_labels_are_not_compared_in_their_narrow_type() -> None:
    wrapped = torch.tensor([156], dtype=torch.uint8)  # -100 in eight bits
    with pytest.raises(ValueError, match="156"):
        checks.check_labels_in_range(wrapped, 2, -100)
    checks.check_labels_in_range(wrapped, 300, None)  # 300 is 44 in eight bits
    checks.check_labels_in_range(torch.tensor([-100]), 2, -100)


def test_labels_without_data_are_not_looked_at() -> None:
    target = torch.full((4,), 9)
    checks.check_labels_in_range(target.to("meta"), 2, None)
    checks.check_labels_in_range(target[:0], 2, None)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(target: torch.Tensor) -> torch.Tensor:
        checks.check_labels_in_range(target, 2, None)
        return target + 1

    assert compiled(target)[0] == 10


@pytest.mark.gpu
def test_gpu_labels_are_looked_at_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.full((4,), 9, device="cuda")
    checks.check_labels_in_range(target, 2, None)
    monkeypatch.setenv("TRITONLOSS_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match="9"):
        checks.check_labels_in_range(target, 2, None)
