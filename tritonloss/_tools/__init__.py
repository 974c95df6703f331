"""The tools of ``python -m tritonloss``: doctor and tuner, and what they measure with."""
