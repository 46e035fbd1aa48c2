import torch

from modelwright.maths.effects import effects


def test_effects_by_hand():
    # Of two examples with gradients 1 and 3: mean 2, mean square 5. Weight 2: |w g| 4, w F w 20, |4 - 10| 6.
    weight, gradient, fisher = torch.tensor([2.0, -1.0]), torch.tensor([2.0, 1.0]), torch.tensor([5.0, 2.0])
    for effect, expected in (("first", [4.0, 1.0]), ("second", [20.0, 2.0]), ("mix", [6.0, 2.0]), ("channel", [4.0, -1.0])):
        assert effects(effect, weight, gradient, fisher).tolist() == expected
