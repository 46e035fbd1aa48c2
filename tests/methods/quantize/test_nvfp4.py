import torch

from modelwright.methods.quantize.nvfp4 import Nvfp4


def test_a_case_by_hand():
    # Two groups, whose largest sizes are 6 and 3: scales 1 and 0.5, over the factor 448 / 1, which is exact. Of the first group 2.4 goes
    # to 2 and 5.1 to 6; of the second 1.2 / 0.5 = 2.4 to 2 · 0.5.
    weight = torch.tensor([[6.0, 2.4, 5.1, -0.2] + [0.0] * 12 + [3.0, 1.2] + [0.0] * 14])
    layer = Nvfp4().tensor(weight)
    assert layer.weight_global_scale.item() == 448
    assert layer.weight_scale.float().tolist() == [[448.0, 224.0]]
    assert layer.dense()[0, :4].tolist() == [6.0, 2.0, 6.0, 0.0]
    assert layer.dense()[0, 16:18].tolist() == [3.0, 1.0]


def test_a_group_of_zeros_and_a_matrix_of_zeros_stay_zero():
    weight = torch.randn(4, 64)
    weight[1, :16] = 0
    assert (Nvfp4().tensor(weight).dense()[1, :16] == 0).all()
    assert (Nvfp4().tensor(torch.zeros(4, 64)).dense() == 0).all()
