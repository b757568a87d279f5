"""The rotation's own backward pass, against finite differences and complex numbers."""

from typing import Any

import pytest
import torch

from openpalm.model.rotary import _rotate_compiled, _Rotation


@pytest.mark.parametrize("turn", [_Rotation.apply, _rotate_compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("halves", [True, False])
def test_rotation_and_its_gradient(halves: bool, turn: Any):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 8, generator=generator, dtype=torch.float64)
    angle = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)
    whole = angle.repeat(1, 1, 2) if halves else angle.repeat_interleave(2, dim=-1)
    cos, sin = whole.cos(), whole.sin()

    first, second = x.chunk(2, -1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    found = turn(x, cos, sin, halves)
    a, b = found.chunk(2, -1) if halves else found.unflatten(-1, (-1, 2)).unbind(-1)
    assert (torch.complex(a, b) - turned).abs().max() < 1e-12

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return turn(x, cos, sin, halves)

    assert torch.autograd.gradcheck(rotate, (x.clone().requires_grad_(),))
