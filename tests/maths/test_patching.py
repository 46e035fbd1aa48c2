import pytest
import torch

from modelwright.core.errors import DataError
from modelwright.maths.patching import patch, stitch


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", [0.0, 0.1, 0.125, 0.25])
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_patches_are_stitched_to_the_image(levels, padding):
    whole = image(2, 3, 32, 48)
    patches = patch(whole, levels, padding)
    number, rim = 4**levels, (round(32 * padding), round(48 * padding)) if levels else (0, 0)
    assert patches.shape == (2 * number, 3 * (levels + 1), 32 // 2**levels + 2 * rim[0], 48 // 2**levels + 2 * rim[1])
    assert torch.equal(stitch(patches[:, :3], levels, padding), whole)


def test_no_levels_are_the_image_itself():
    whole = image(1, 2, 7, 5)
    assert patch(whole, 0, 0.3) is whole
    assert stitch(whole, 0, 0.3) is whole


def test_a_case_by_hand():
    # A row-like image 8 wide, one level: patches are columns 0-3 and 4-7. Thinned out it has columns 0, 2, 4, 6, and the views
    # of 4 points that are centred on the patches begin one before the patches' own two points, and go around.
    whole = torch.arange(8.0).repeat(8, 1)[None, None]
    patches = patch(whole, 1)
    assert patches[0, :, 0].tolist() == [[0, 1, 2, 3], [6, 0, 2, 4]]
    assert patches[1, :, 0].tolist() == [[4, 5, 6, 7], [2, 4, 6, 0]]
    assert patches.shape == (4, 2, 4, 4)
    assert patch(whole, 1, 0.125)[1, 0, 0].tolist() == [3, 4, 5, 6, 7, 0]


def test_surroundings_are_what_lies_around():
    whole = image(1, 1, 16, 16)
    patches = patch(whole, 2, 0.125)
    around = torch.nn.functional.pad(whole, (2, 2, 2, 2), mode="circular")
    assert torch.equal(patches[6, 0], around[0, 0, 4:12, 8:16])  # second row, third column


def test_every_view_is_centred_on_its_patch():
    # Of a function that turns once around, each view's mean angle is that of the patch's centre, up to half a thinned step.
    angle = 2 * torch.pi * torch.arange(64) / 64
    whole = torch.stack([angle.cos(), angle.sin()])[None, :, None].expand(1, 2, 64, 64)
    patches = patch(whole, 2)
    mean = patches.mean((2, 3)).view(16, 3, 2)
    own = torch.atan2(mean[:, 0, 1], mean[:, 0, 0])
    other = torch.atan2(mean[:, 1, 1], mean[:, 1, 0])  # the second view, of 16 points at steps of 2, is half of the circle
    apart = torch.remainder(other - own + torch.pi, 2 * torch.pi) - torch.pi
    assert apart.abs().max() < 2 * torch.pi / 64 * 2


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(DataError, match=r"12 × 10 cannot be cut into 2\^2 patches"):
        patch(image(1, 1, 12, 10), 2)
