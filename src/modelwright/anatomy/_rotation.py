"""Turn the stream between the blocks: the same function in another basis.

With norms that only divide by the root mean square, an orthogonal Q [width, width] can be put into every matrix that reads the
stream and its transpose into every one that writes to it (Ashkboos et al. 2024, arXiv:2401.15024, section 3.1). Each place
between attentions and MLPs may have a Q of its own where what goes around them is turned from one to the next (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import LayoutError, SiteError

from ._base import READS, Units, input_dim, is_residual_norm
from ._find import anatomy_of
from .removal import resizing


def stream_of(module: Any) -> Units:
    """The channels of the stream.

    Raises:
        SiteError: it cannot be turned: there are norms that subtract a mean, or that stand behind attentions and MLPs.
    """
    anatomy = anatomy_of(module)
    try:
        found = anatomy.units(module, "residual")[0]
    except SiteError as error:
        raise LayoutError(f"The hidden states cannot be turned: {error}.") from error
    norms = [path for path, _ in residual_norms(module)]
    if anatomy.norms_write or any("feedforward" in path for path in norms):
        raise LayoutError(f"The hidden states cannot be turned: norms of {anatomy.name} models also write to it.")
    return found


def residual_norms(module: Any) -> list[tuple[str, nn.Module]]:
    """The norms over the stream, by path, in the order of the model."""
    anatomy = anatomy_of(module)
    return [
        (path, child)
        for path, child in module.named_modules()
        if (anatomy.role(path) or ("",))[0] == "norm" and is_residual_norm(f"{path}.") and getattr(child, "weight", None) is not None
    ]


def untie(module: Any) -> None:
    """Give a head that is tied to the embedding a weight of its own."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        module.config.tie_word_embeddings = False


@torch.no_grad()
def fold_norms(module: Any) -> None:
    """Put the weights of norms into the matrices that read what they give; a head that is tied to the embedding comes apart.

    A block's first norm is read by its attention and its second by its MLP; the one behind the blocks by the head.
    """
    anatomy = anatomy_of(module)
    untie(module)
    stack = anatomy.blocks(module)
    norms = residual_norms(module)
    for site in anatomy.sites(module):
        if site.role != "head" and site.role not in READS:
            continue
        if site.role == "head":
            own = [norm for path, norm in norms if (anatomy.role(path) or ("", None))[1] is None]
        else:
            own = [norm for path, norm in norms if path.startswith(f"{stack}.{site.depth}.")]
            half = len(own) // 2
            own = own if len(own) == 1 else own[:half] if site.role.startswith("attn") else own[half:]
        scale = own[0].get_parameter("weight")
        weight, dim = module.get_parameter(site.name), input_dim(site)
        turned = weight.double().movedim(dim, -1) * (scale.double() + anatomy.norm_offset)
        weight.copy_(turned.movedim(-1, dim))
    for _, norm in norms:
        norm.get_parameter("weight").fill_(1 - anatomy.norm_offset)


@torch.no_grad()
def rotate_stream(module: Any, rotation: Tensor) -> None:
    """Give the stream the basis of the columns of `rotation` [width, width], orthogonal; norms must be folded before."""
    tensors = dict(module.named_parameters())
    anatomy = anatomy_of(module)
    for span in stream_of(module).spans:
        if (anatomy.role(span.name) or ("",))[0] != "norm":
            weight = tensors[span.name]
            turned = weight.double().movedim(span.dim, -1) @ rotation.to(weight.device, torch.float64)
            weight.copy_(turned.movedim(-1, span.dim))


@torch.no_grad()
def slice_stream(module: Any, bases: Sequence[Tensor]) -> None:
    """Give the stream a basis of its own, with fewer channels, before each attention and MLP and behind the last.

    bases: each [width, channels], of orthonormal columns; norms must be folded before. They average over the channels that
    are left, so that their weights take √(width / channels) and their eps width / channels. What goes around attentions and
    MLPs is as before, and must be turned in its turn.
    """
    anatomy, tensors = anatomy_of(module), dict(module.named_parameters())
    branches, norms = anatomy.branches(module), dict(residual_norms(module))
    owners = [(f"{path}.", number) for number, branch in enumerate(branches) for path in (branch.module, *branch.norms)]
    with resizing(module):
        for span in stream_of(module).spans:
            own = next((number for path, number in owners if span.name.startswith(path)), None)
            weight = tensors[span.name]
            basis = bases[(0 if span.output else len(branches)) if own is None else own + span.output].to(weight.device, torch.float64)
            ratio = basis.shape[0] / basis.shape[1]
            if (norm := norms.get(span.name.rpartition(".")[0])) is None:
                weight.data = (weight.double().movedim(span.dim, -1) @ basis).movedim(-1, span.dim).to(weight.dtype).contiguous()
                continue
            weight.data = torch.full_like(weight[: basis.shape[1]], ratio**0.5 - anatomy.norm_offset)
            for name in ("variance_epsilon", "eps"):
                if isinstance(getattr(norm, name, None), float):
                    setattr(norm, name, getattr(norm, name) * ratio)
