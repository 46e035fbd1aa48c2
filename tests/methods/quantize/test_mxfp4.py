import pytest
import torch

from modelwright.core.errors import SettingError
from modelwright.methods.quantize.gptq import Gptq
from modelwright.methods.quantize.mxfp4 import Mxfp4
from modelwright.methods.quantize.rtn import Rtn


def test_a_case_by_hand():
    # The largest size is 13 = 1.625 · 8: the scale is 2^(3 - 2) = 2. 13 / 2 = 6.5 is cut to 6; 5 / 2 = 2.5 is half way from 2 to 3 and
    # goes to the even mantissa, 2; -0.6 / 2 = -0.3 goes to -0.5; 0.4 / 2 = 0.2 to 0.
    weight = torch.tensor([[13.0, 5.0, -0.6, 0.4] * 8])
    assert Mxfp4().tensor(weight).dense()[0, :4].tolist() == [12.0, 4.0, -1.0, 0.0]


def test_a_group_of_another_size_is_refused_by_name():
    with pytest.raises(SettingError, match=r"grid mxfp4 has groups of 32 weights; got group 64. Set group: 32"):
        Rtn(grid="mxfp4", group=64)
    with pytest.raises(SettingError, match=r"grid nf4 has 4 bits; got bits 3"):
        Gptq(grid="nf4", bits=3)
    with pytest.raises(SettingError, match=r"have 8 bits already"):
        Mxfp4(nested=True)
    with pytest.raises(SettingError, match=r"zero points are for the grid integer"):
        Rtn(grid="k-means", symmetric=False)
    with pytest.raises(SettingError, match=r"nested scales are for other grids"):
        Rtn(nested=True)


def test_rows_that_its_groups_do_not_divide_have_others_and_no_name_elsewhere():
    layer = Mxfp4().tensor(torch.randn(8, 48))
    assert layer.group == 16
    assert layer.scheme() is None
    assert Mxfp4().tensor(torch.randn(8, 64)).scheme()["format"] == "mxfp4-pack-quantized"
