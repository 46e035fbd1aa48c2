"""Large images as small ones that still see far: multi-grid patches.

Kossaifi et al. 2023, arXiv:2310.00120, section 4. With L levels an image is cut into 2^L × 2^L patches, each with some of its
surroundings; beside them, as more channels, are views of the same number of points centred on the patch, on the image thinned
out by 2, 4, ..., 2^L. Edges go around. A model then works on every patch by itself, and its outputs are cropped and put together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelwright.core.errors import DataError


def patch(image: Tensor, levels: int, padding: float = 0.0) -> Tensor:
    """[batch, channels, height, width] → [batch · 4^L, channels · (L + 1), height / 2^L + 2 p, width / 2^L + 2 q].

    levels: L; 0 gives the image itself. padding: p / height = q / width, the surroundings on each side as a share of the image.
    The patches of an image follow each other row by row; channels are those of the image, then of each thinner view.

    Raises:
        DataError: a side is no multiple of 2^L.
    """
    sides = (image.shape[-2], image.shape[-1])
    if levels == 0:
        return image
    if any(size % 2**levels for size in sides):
        raise DataError(f"An image of {sides[0]} × {sides[1]} cannot be cut into 2^{levels} patches a side. Crop it, or use fewer levels.")
    views = []
    for level in range(levels + 1):
        thin = image[..., :: 2**level, :: 2**level]
        rows, columns = (_windows(size, levels, level, round(padding * size)).to(image.device) for size in sides)
        seen = thin[..., rows[:, None, :, None], columns[None, :, None, :]]  # [batch, channels, down, across, height, width]
        views.append(seen.movedim(1, 3))
    return torch.cat(views, 3).flatten(0, 2)


def stitch(patches: Tensor, levels: int, padding: float = 0.0) -> Tensor:
    """[batch · 4^L, channels, height, width] of patches with their surroundings → images of what lies within.

    levels, padding: as the patches were made by `patch`; of its channels, the first ones are the image's own.
    """
    if levels == 0:
        return patches
    number = 2**levels
    within = [size - 2 * surrounding(size, levels, padding) for size in patches.shape[-2:]]
    starts = [(size - inner) // 2 for size, inner in zip(patches.shape[-2:], within, strict=True)]
    inner = patches[..., starts[0] : starts[0] + within[0], starts[1] : starts[1] + within[1]]
    apart = inner.unflatten(0, (-1, number, number))  # [batch, down, across, channels, height, width]
    return apart.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def surrounding(size: int, levels: int, padding: float) -> int:
    """The points on each side of a patch of this size that are its surroundings."""
    return next(p for p in range(size) if round(padding * (size - 2 * p) * 2**levels) == p)


def _windows(size: int, levels: int, level: int, padding: int) -> Tensor:
    """Places [2^L, size / 2^L + 2 padding] on a side thinned out by 2^level: of each patch's centre and what is around it."""
    own = size >> levels
    first = torch.arange(1 << levels) * own // 2**level - -(-(own - own // 2**level) // 2) - padding
    return (first[:, None] + torch.arange(own + 2 * padding)) % (size // 2**level)
