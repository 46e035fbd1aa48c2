"""Caches of fewer bits: what they hold, what attention reads, and what models write with them."""

import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.caches import KiviLayer
from modelwright.core.errors import ModelError, SettingError
from modelwright.maths.ranges import cut, filled

HEADS, CHANNELS = 2, 16


def states(tokens, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, HEADS, tokens, CHANNELS, generator=random).to(dtype) for _ in range(2))


def given(layer, keys, values, parts):
    """What the layer's last call returned when tokens came in parts of these sizes."""
    start, found = 0, None
    for size in parts:
        found = layer.update(keys[..., start : start + size, :], values[..., start : start + size, :])
        start += size
    assert start == keys.shape[-2]
    return found


def after(layer, keys, values, parts):
    """All that the layer holds of these tokens, as attention reads it with the next token."""
    given(layer, keys, values, parts)
    more = states(1, seed=9, dtype=keys.dtype)
    return tuple(whole[..., :-1, :] for whole in layer.update(*more))


def test_as_many_tokens_as_stay_whole_are_exact():
    keys, values = states(32)
    found = after(KiviLayer(2, 8, 64), keys, values, [30, 1, 1])
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    _, values_read = after(
        KiviLayer(2, 8, 32), keys, values, [32]
    )  # of values exactly `residual` stay, keys are rounded when so many are there
    assert torch.equal(values_read, values)


def test_a_prompt_is_read_as_it_is_and_rounded_for_later():
    keys, values = states(100)
    layer = KiviLayer(2, 8, 32)
    found = layer.update(keys, values)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    assert (layer.keys.shape[-2], layer.values.shape[-2]) == (4, 32)  # 100 = 3 · 32 + 4
    assert layer.get_seq_length() == 100


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_token_by_token_it_holds_what_all_at_once_gives(bits):
    keys, values = states(75, dtype=torch.bfloat16)
    once, slowly, between = (KiviLayer(bits, 8, 16) for _ in range(3))
    given(once, keys, values, [75])
    given(slowly, keys, values, [1] * 75)
    given(between, keys, values, [20, 1, 40, 14])
    for layer in (slowly, between):
        assert layer.stored.keys() == once.stored.keys()
        for name, value in once.stored.items():
            assert torch.equal(layer.stored[name], value), name
        assert torch.equal(layer.keys, once.keys)
        assert torch.equal(layer.values, once.values)


def test_keys_are_rounded_by_channel_over_tokens_and_values_by_token_over_channels():
    keys, values = states(40)
    found = after(KiviLayer(2, 8, 16), keys, values, [40])
    by_channel = filled(*cut(keys[..., :32, :].transpose(-1, -2), 2, 8), 2).transpose(-1, -2)
    by_token = filled(*cut(values[..., :24, :], 2, 8), 2)
    assert torch.equal(found[0], torch.cat([by_channel, keys[..., 32:, :]], -2))
    assert torch.equal(found[1], torch.cat([by_token, values[..., 24:, :]], -2))


def test_the_error_of_keys_does_not_depend_on_the_scale_of_their_channels():
    keys, values = states(64)
    powers = 2.0 ** torch.randint(-6, 7, (CHANNELS,), generator=torch.Generator().manual_seed(1))
    plain, _ = after(KiviLayer(2, 8, 32), keys, values, [64])
    scaled, _ = after(KiviLayer(2, 8, 32), keys * powers, values, [64])
    assert torch.equal(scaled, plain * powers)
    any_scale = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(2)) + 0.1
    scaled, _ = after(KiviLayer(2, 8, 32), keys * any_scale, values, [64])
    assert torch.allclose(scaled / any_scale, plain, atol=1e-5)


def test_with_outlier_channels_keys_by_token_would_collapse():
    keys, values = states(64)
    keys[..., 3] += 40  # as models have them: one channel that is large in every token
    query = torch.randn(1, HEADS, 8, CHANNELS, generator=torch.Generator().manual_seed(5))
    ordinary = torch.arange(CHANNELS) != 3

    def error(found):
        return ((found - keys)[..., ordinary].square().mean() / keys[..., ordinary].square().mean()).item()

    by_channel, _ = after(KiviLayer(2, 8, 32), keys, values, [64])
    by_token = filled(*cut(keys, 2, 16), 2)
    assert error(by_channel) < 0.15
    assert error(by_token) > 0.9  # nothing is left of the other channels
    off = [(query @ (found - keys).transpose(-1, -2)).square().mean() for found in (by_channel, by_token)]
    assert off[1] > 4 * off[0]


def test_sixteen_bits_round_nothing():
    keys, values = states(200, dtype=torch.bfloat16)
    layer = KiviLayer(16, 32, 32)
    found = after(layer, keys, values, [150, 50])
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    assert not layer.stored


def test_bytes_by_hand():
    # 96 of 100 keys and 68 values, in 16 channels of 2 heads; 2 bits each, with a scale and a least value of 2 bytes for 8 of them
    cache = mw.kivi_cache(tiny("llama").config, group=8, residual=32)
    cache.update(*states(100, dtype=torch.bfloat16), 0)
    rounded, whole = (96 + 68) * 16 * 2, (4 + 32) * 16 * 2
    assert cache.stored_bytes() == rounded // 4 + rounded // 8 * 4 + whole * 2


@pytest.mark.parametrize("make", [lambda c: mw.kivi_cache(c, group=4, residual=8), mw.fp8_cache], ids=["kivi", "fp8"])
def test_a_model_writes_with_it_and_the_memory_is_smaller(make):
    model = tiny("llama", hidden_size=64).to(torch.bfloat16)
    ids = torch.randint(5, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = make(model.config)
    written = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert written.shape == (2, 60)
    assert cache.get_seq_length() == 59
    from transformers import DynamicCache

    plain = DynamicCache(config=model.config)
    model.generate(ids, past_key_values=plain, max_new_tokens=20, do_sample=False, pad_token_id=0)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert cache.stored_bytes() < 0.75 * held
    assert written[0, 40] == model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, 40]  # the prompt is read whole


def test_a_short_text_is_written_as_without_it():
    model = tiny("llama")
    ids = torch.randint(5, 60, (1, 8), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    written = model.generate(
        ids, past_key_values=mw.kivi_cache(model.config, group=8, residual=32), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert torch.equal(written, expected)


def test_beams_are_reordered_with_what_is_stored():
    keys, values = (torch.cat(both) for both in zip(states(40), states(40, seed=1), strict=True))
    for cache in (KiviLayer(2, 8, 16), mw.fp8_cache(tiny("llama").config, "token").layers[0]):
        cache.update(keys, values)
        before = tuple(value.clone() for value in cache.update(keys[..., :1, :], values[..., :1, :]))
        cache.reorder_cache(torch.tensor([1, 0]))
        now = cache.update(keys[..., :1, :], values[..., :1, :])
        assert torch.equal(now[0][0, :, :30], before[0][1, :, :30])
        assert torch.equal(now[1][1, :, :20], before[1][0, :, :20])
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(cache.update(keys, values)[0], keys)


@pytest.mark.parametrize("scope", ["head", "tensor", "token"])
def test_floats_of_8_bits_are_within_their_precision(scope):
    keys, values = states(50, dtype=torch.bfloat16)
    keys[:, 1] *= 100
    cache = mw.fp8_cache(tiny("llama").config, scope)
    layer = cache.layers[0]
    found = after(layer, keys, values, [50])
    # 3 bits of mantissa: off by a 16th at most, and by a little of the largest where numbers are below the least normal one
    least = {"head": keys.abs().amax((0, 2, 3), keepdim=True), "tensor": keys.abs().amax(), "token": keys.abs().amax(3, keepdim=True)}[
        scope
    ]
    assert ((found[0] - keys).abs() <= keys.abs() * (1 / 16 + 1 / 64) + least / 448 / 512).all()
    assert layer.stored["key"].dtype == torch.float8_e4m3fn
    count = 51 * HEADS * CHANNELS * 2
    assert cache.stored_bytes() == count + {"head": 2 * HEADS * 4, "tensor": 2 * 4, "token": count // CHANNELS * 2}[scope]


def test_scales_of_the_prompt_stay_and_what_is_larger_is_cut_off():
    keys, values = states(10)
    layer = mw.fp8_cache(tiny("llama").config, "tensor").layers[0]
    layer.update(keys, values)
    first = layer.scales["key"].clone()
    layer.update(keys * 10, values)
    assert torch.equal(layer.scales["key"], first)
    found, _ = layer.update(keys[..., :1, :], values[..., :1, :])
    assert found.abs().max() == pytest.approx(keys.abs().max().item(), rel=1e-5)
    assert found.isfinite().all()
    layer = mw.fp8_cache(tiny("llama").config, "tensor").layers[0]
    layer.update(keys * 0, values)  # a scale is never 0
    assert layer.update(keys, values)[0][..., :10, :].count_nonzero() == 0


def test_what_does_not_fit_is_refused():
    config = tiny("llama").config
    for wrong in (dict(bits=9), dict(bits=0), dict(bits=3, group=4), dict(group=32, residual=16), dict(group=32, residual=40)):
        with pytest.raises(SettingError):
            mw.kivi_cache(config, **wrong)
    with pytest.raises(SettingError, match="head, tensor or token"):
        mw.fp8_cache(config, "row")
    with pytest.raises(ModelError, match="does not divide the 16 channels"):
        KiviLayer(2, 32, 32).update(*states(4))
    with pytest.raises(ModelError, match="which cannot"):
        KiviLayer(2, 8, 32).crop(-1)
    windows = type(config)(**{**config.to_dict(), "layer_types": ["sliding_attention"] * config.num_hidden_layers, "sliding_window": 8})
    with pytest.raises(ModelError, match="attend to all tokens"):
        mw.kivi_cache(windows)


def test_layers_with_a_window_keep_their_own_cache():
    config = tiny("llama").config
    kinds = ["sliding_attention"] + ["full_attention"] * (config.num_hidden_layers - 1)
    cache = mw.kivi_cache(type(config)(**{**config.to_dict(), "layer_types": kinds, "sliding_window": 8}), group=8, residual=8)
    assert [isinstance(layer, KiviLayer) for layer in cache.layers] == [kind == "full_attention" for kind in kinds]
    for number in range(len(kinds)):
        cache.update(*states(20), number)
    window, rest = cache.layers[0], cache.layers[1:]
    held = [window.keys, window.values, *(value for layer in rest for value in (*layer.stored.values(), layer.keys, layer.values))]
    assert 0 <= cache.stored_bytes() - sum(value.nbytes for value in held) < 64  # transformers keeps the window's size in a tensor
