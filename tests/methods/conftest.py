"""Makes `tests/methods/` importable, so that tests share `calibration`; one thread suits matrices this small."""

import torch

torch.set_num_threads(1)
