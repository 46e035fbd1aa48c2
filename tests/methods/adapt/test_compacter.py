import peft
import pytest
import torch
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks.kronecker import KroneckerMap, Slow
from modelwright.core.errors import ModelError, SiteError
from modelwright.core.tuners import Bearer, config_class
from modelwright.methods.adapt.compacter import Compacter

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's


def kronecker(made, slow):
    """H [in, out] as the sum of Kronecker products that it is."""
    fast = made.left if made.right is None else made.left @ made.right
    return sum(torch.kron(one, two) for one, two in zip(slow.matrices, fast, strict=True))


def test_a_case_by_hand():
    # n = 2, S_1 = [[1, 0], [0, 0]], S_2 = [[0, 2], [0, 0]], u = (3), v = (5) and u = (1), v = (1): H = [[15, 2], [0, 0]].
    made, slow = KroneckerMap(2, 2, terms=2, rank=1, own=False), Slow(2)
    with torch.no_grad():
        slow.matrices.copy_(torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]]))
        made.left.copy_(torch.tensor([3.0, 1.0]).view(2, 1, 1))
        made.right.copy_(torch.tensor([5.0, 1.0]).view(2, 1, 1))
        made.bias.copy_(torch.tensor([0.5, 0.0]))
        assert torch.equal(made(torch.tensor([[1.0, 7.0]]), slow), torch.tensor([[15.5, 2.0]]))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_map_is_the_sum_of_kronecker_products(rank):
    torch.manual_seed(0)
    made, slow, x = KroneckerMap(12, 8, terms=4, rank=rank, own=False), Slow(4, spread=1.0), torch.randn(3, 5, 12)
    assert torch.allclose(made(x, slow), x @ kronecker(made, slow) + made.bias, atol=1e-5)


def test_one_term_is_a_scaled_map_of_rank_one():
    torch.manual_seed(0)
    made, slow, x = KroneckerMap(6, 4, terms=1, rank=1, own=False), Slow(1, spread=1.0), torch.randn(5, 6)
    assert torch.allclose(made(x, slow), slow.matrices.item() * (x @ made.left[0] @ made.right[0]), atol=1e-6)


def adapted(kind="llama", **settings):
    return mw.apply(mw.open(tiny(kind)), Compacter(**{"reduction": 8, **settings})).module


def test_all_maps_share_one_slow_tensor_and_the_count_is_the_papers():
    model = adapted(norms=False)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    shared = [name for name in trained if "slow" in name or "shared" in name]
    assert len(shared) == 1
    width, inner, places = 64, 8, 2 * 4
    each = (width + inner) + inner + (inner + width) + width  # p (k + d) + d for each of two maps
    assert sum(value.numel() for value in trained.values()) == places * each + 4**3
    phm = adapted(norms=False, rank=0, slow="each")
    trained = [value.numel() for value in phm.parameters() if value.requires_grad]
    assert sum(trained) == places * (2 * 64 * 8 // 4 + width + inner + 2 * 4**3)


def test_norms_train_as_copies_and_come_back(tmp_path):
    before = tiny()
    model = adapted()
    norms = [name for name, value in model.named_parameters() if value.requires_grad and "norm" in name]
    assert len(norms) == 2 * 4 + 1
    with torch.no_grad():
        for _name, value in model.named_parameters():
            if value.requires_grad:
                value.add_(0.1)
    first = outputs(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(before))
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter")).eval()
    assert torch.allclose(outputs(loaded), first, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"rank": 0, "slow": "each"}])
def test_attaching_hardly_changes_outputs(settings):
    before = outputs(tiny())
    change = (outputs(adapted(**settings)) - before).norm() / before.norm()
    assert 0 < change < (0.05 if settings else 1e-4)


def test_a_bottleneck_stands_behind_attention_and_mlp_or_behind_the_mlp_alone():
    def paths(**settings):
        return [path for path, layer in adapted(**settings).get_base_model().named_modules() if isinstance(layer, Bearer)]

    assert {path.rpartition(".")[2] for path in paths()} == {"o_proj", "down_proj"}
    assert {path.rpartition(".")[2] for path in paths(where="mlp.down")} == {"down_proj"}


def test_gradients_reach_all_that_trains():
    model = adapted()
    model(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters() if value.requires_grad)


def test_terms_must_divide_the_widths():
    with pytest.raises(SiteError, match=r"gives 64 channels, which reduction=8 makes 8; terms=3 must divide both\. Give another"):
        adapted(terms=3)
    with pytest.raises(SiteError, match=r"reduction=32 makes 2; terms=4 must divide both"):
        adapted(reduction=32)
    with pytest.raises(ModelError, match=r"reduction=100 makes 0"):
        peft.get_peft_model(tiny(), config_class(Compacter)(target_modules=["o_proj"], reduction=100))
