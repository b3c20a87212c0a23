"""Constants on a device."""

import torch

from methods.views.batch import constant


def test_equal_numbers_of_other_types_are_other_constants():
    device = torch.device("cpu")
    kinds = {torch.int64: (1, 0), torch.float32: (1.0, 0.0), torch.bool: (True, False)}
    for kind, values in kinds.items():
        assert constant(values, device).dtype == kind
    assert constant((1, 0), device) is constant((1, 0), device)
