"""The loss that searches of coefficients lower."""

import pytest
import torch
from tiny import tiny

from modelwright.core.errors import SiteError
from modelwright.methods.merge._objective import nats


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_pad_tokens_do_not_count(side):
    module, rows = tiny(seed=0), torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    counts, wide, mask = (12, 7, 9), torch.zeros(3, 30, dtype=torch.long), torch.zeros(3, 30, dtype=torch.long)
    for row, count in enumerate(counts):
        start = {"right": 0, "left": 30 - count, "both": 5}[side]
        wide[row, start : start + count], mask[row, start : start + count] = rows[row, :count], 1
    plain = [{"input_ids": rows[row : row + 1, :count]} for row, count in enumerate(counts)]
    assert nats(module, [{"input_ids": wide, "attention_mask": mask}]) == pytest.approx(nats(module, plain), rel=1e-6)
    assert nats(module, [{"input_ids": rows, "attention_mask": torch.ones_like(rows)}]) == nats(module, [{"input_ids": rows}])


def test_rows_without_a_token_to_predict_are_refused():
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(SiteError, match="two tokens or more"):
        nats(tiny(), [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
