"""Cases, bytes and goals of the focal loss."""

from __future__ import annotations

from dataclasses import replace

import kernels_reference
from perf.operations import peers
from perf.operations.contract import Operation
from perf.operations.pixel_cases import (
    CASES,
    KERNELS,
    SHIPPED,
    SOFTMAX_CODE,
    WIDE,
    code_goals,
    floor,
    inputs,
    launch,
)
from tritonloss import functional
from tritonloss.pixelwise.focal_loss import FOCAL, Options

OPERATIONS = (
    Operation(
        name="focal_loss",
        function=functional.focal_loss,
        reference=kernels_reference.focal_loss,
        inputs=inputs,
        launch=launch(FOCAL, Options()),
        floor=floor,
        cases=tuple(replace(case, against_compile=False) for case in CASES[:4]),
        shipped=(*SHIPPED[:3], *WIDE),
        kernels=KERNELS,
        operators=("focal_forward", "focal_backward"),
        goals=code_goals("Focal loss", *SOFTMAX_CODE),
        libraries=peers.FOCAL_LOSS,
    ),
)
