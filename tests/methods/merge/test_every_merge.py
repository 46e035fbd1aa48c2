"""What must hold of every method that merges tensor by tensor."""

import pytest
import torch
from calibration import normal
from merging import merged

from modelwright.core import find
from modelwright.methods.merge._mechanism import PointWise

BASE, COMMON = normal(6, 8), normal(6, 8, seed=9)
METHODS = [name for name in find.names() if name.startswith("merge.") and issubclass(find.find(name), PointWise)]
DEFAULTS = {  # published, or the named library's own where nothing is published
    "merge.ties": {"keep": 0.2, "scale": 1.0, "normalize": True, "consensus": True, "scope": "tensor"},  # 2306.01708, section 5
    "merge.task_arithmetic": {"normalize": False, "consensus": False, "scale": 1.0},
    "merge.dare": {"normalize": False, "consensus": False, "rescale": "inverse"},  # 2311.03099, equation 3
    "merge.della": {"spread": 0.15, "normalize": True, "consensus": True, "rescale": "l1"},  # mergekit: epsilon .15
    "merge.breadcrumbs": {"top": 0.01, "normalize": False, "consensus": False},  # mergekit: gamma .01
    "merge.consensus": {"agree": 2, "keep": 1.0},  # 2405.07813, section 5
    "merge.pcb": {"clamp": 0.01, "keep": 0.1},  # 2410.02396, for T5
    "merge.localize_and_stitch": {"keep": 0.1, "skip": "embed", "scale": 1.0},
    "merge.karcher": {"iterations": 10, "tolerance": 1e-5},
    "merge.sce": {"keep": 1.0},
    "merge.linear": {"normalize": True},
    "merge.slerp": {"t": 0.5},
    "merge.nearswap": {"t": 1e-3},
    "merge.lines": {"start": None, "rise": 0.5, "keep": 1.0},
}


def donors_of(method):
    low, high = type(method).takes
    count = max(low, 2) if high is None else high
    return [BASE + 0.1 * (COMMON + normal(6, 8, seed=seed)) for seed in range(1, count + 1)]


def test_all_of_them_are_here():
    assert len(METHODS) >= 19
    assert set(DEFAULTS) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_models_dtype_and_shape_whatever_the_donors_dtype(name, dtype):
    method = find.find(name)()
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    donors = [donor.to(other) for donor in donors_of(method)]
    before = [donor.clone() for donor in donors]
    base = BASE.to(dtype)
    found = merged(method, base, donors)
    assert found.dtype == dtype
    assert found.shape == base.shape
    assert torch.equal(base, BASE.to(dtype))
    assert all(torch.equal(donor, one) for donor, one in zip(donors, before, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_every_donor_counts(name):
    """Another donor in the place of any one of them gives another tensor."""
    method = find.find(name)()
    donors, other = donors_of(method), BASE + 0.3 * (COMMON + normal(6, 8, seed=99))
    first = merged(method, BASE, donors)
    for number in range(len(donors)):
        others = [other if place == number else donor for place, donor in enumerate(donors)]
        assert not torch.equal(merged(method, BASE, others), first), number


@pytest.mark.parametrize(("name", "settings"), DEFAULTS.items(), ids=DEFAULTS)
def test_without_settings_it_has_the_published_ones(name, settings):
    method = find.find(name)()
    assert {key: getattr(method, key) for key in settings} == settings
