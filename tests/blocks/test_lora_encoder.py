import math

import pytest
import torch
from torch.nn import functional as F

from modelwright.blocks.lora_encoder import LoraEncoder, contrast, retrieve

LAYERS = {"0.q_proj": (6, 8), "0.k_proj": (4, 8), "1.q_proj": (6, 8)}


def made(text=5, **settings):
    torch.manual_seed(0)
    return LoraEncoder(LAYERS, text, **{"width": 16, "heads": 2, "inner": 32, "probes": 2, **settings})


def pairs(seed, rank=2):
    random = torch.Generator().manual_seed(seed)
    return {path: (torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random))
            for path, (rows, columns) in LAYERS.items()}  # fmt: skip


def test_only_the_product_is_seen_at_any_rank():
    encoder, found = made(), pairs(0)
    turn = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    turned = {path: (up @ turn, torch.linalg.inv(turn) @ down) for path, (up, down) in found.items()}
    padded = {path: (F.pad(up, (0, 3)), torch.cat([down, torch.ones(3, down.shape[1])])) for path, (up, down) in found.items()}
    expected = encoder(found)
    assert expected.norm().item() == pytest.approx(1)
    assert torch.allclose(encoder(turned), expected, atol=1e-5)
    assert torch.allclose(encoder(padded), expected, atol=1e-5)
    assert not torch.allclose(encoder(pairs(1)), expected, atol=1e-2)


def test_a_token_by_hand():
    # B A = [[3, 0], [0, 0]] and the probe (1, 7): X Aᵀ Bᵀ = (3, 0), which the norm makes (1, -1).
    encoder = LoraEncoder({"q": (2, 2)}, 2, width=2, heads=1, inner=2)
    seen = []
    encoder.types["q-2"].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    encoder.probes[0].data.copy_(torch.tensor([[1.0, 7.0]]))
    encoder({"q": (torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0, 0.0]]))})
    assert torch.allclose(seen[0], torch.tensor([[1.0, -1.0]]), atol=1e-4)


def test_layers_left_alone_give_zeros_and_types_share_a_linear():
    encoder, found = made(), pairs(0)
    tokens = []
    encoder.reader.register_forward_pre_hook(lambda _, given: tokens.append(given[0][0]))
    encoder({"0.q_proj": found["0.q_proj"]})
    assert tokens[0].shape == (1 + 3 * 2, 16)
    assert tokens[0][1:3].any()
    assert not tokens[0][3:].any()
    assert set(encoder.types) == {"q_proj-6", "k_proj-4"}


def test_contrast_by_hand():
    one = torch.eye(2)
    # Scores (1, 0) and (0, 1) over 0.5: each row's loss is log(1 + e^-2).
    assert contrast(one, one, temperature=0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert contrast(one, one.flip(0)) > contrast(one, one)


def test_a_text_finds_its_adapter_after_training():
    encoder, library = made(text=6), [pairs(seed) for seed in range(6)]
    texts = torch.eye(6)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for _ in range(80):
        loss = contrast(torch.stack([encoder(found) for found in library]), texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    turn = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
    turned = [{path: (up @ turn, torch.linalg.inv(turn) @ down) for path, (up, down) in found.items()} for found in library]
    with torch.no_grad():
        embeddings = [encoder(found) for found in turned]
    found = [retrieve(text, embeddings, 2) for text in texts]
    assert [nearest[0] for nearest, _ in found] == list(range(6))
    assert all(one[1] > other[1] + 0.1 for one, other in found)
    assert len(retrieve(texts[0], embeddings, 99)) == 6
