"""A freshly initialised small Llama and a byte-level tokenizer trained on the text at hand.

This is what a recipe's `model: {new: llama, config: {...}, tokenizer: {vocabulary: 2048}}` makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelwright.core.errors import SettingError, nearest

if TYPE_CHECKING:
    from modelwright.core.data import Text
    from modelwright.core.model import Model

END = "<|endoftext|>"


def model(stated: Mapping[str, Any], text: Text | None, seed: int) -> Model:
    """The `Model` that a recipe's `model:` mapping asks for.

    Raises SettingError for another architecture or an unknown key, NeedError without text for the tokenizer.
    """
    import torch

    from modelwright.core.errors import NeedError
    from modelwright.core.model import Model

    known = ("new", "config", "tokenizer", "dtype")
    for name in stated:
        if name not in known:
            raise SettingError(f"A new model has no key {name!r}.{nearest(name, known)} Its keys are {', '.join(known)}.")
    if stated.get("new") != "llama":
        raise SettingError(f"A new model of type {stated.get('new')!r} was asked for; the one on offer is llama.")
    dtype = getattr(torch, str(stated.get("dtype", "float32")), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SettingError(f"A new model's dtype is float32, bfloat16 or float16; got {stated.get('dtype')!r}.")
    if text is None:
        raise NeedError("A new model's tokenizer is trained on text; the recipe gives none. Add `data:`.")
    module, tokenizer = fresh(dict(stated.get("config", {})), dict(stated.get("tokenizer", {})), text, seed)
    return Model(name="new llama", module=module.to(dtype), tokenizer=tokenizer)


def fresh(config: dict[str, Any], tokenizer: dict[str, Any], text: Text, seed: int) -> tuple[Any, Any]:
    """A Llama with random float32 weights, and its tokenizer: (model in eval mode, tokenizer).

    `config` holds fields of transformers' LlamaConfig; vocabulary size and special tokens come from the tokenizer.
    `tokenizer` is `{vocabulary: number of tokens}`. The tokenizer learns from `text.documents` only, never from
    the held-out ones. Same arguments, same bits. Raises SettingError for an unknown field.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    known = set(LlamaConfig().to_dict()) | {"rope_theta"}
    for name in config:
        if name not in known:
            raise SettingError(f"The new model's config has {name!r}, which LlamaConfig lacks.{nearest(name, known)}")
    for name in tokenizer:
        if name != "vocabulary":
            raise SettingError(f"The new tokenizer has the setting {name!r}; the only one is 'vocabulary'.")
    length = config.get("max_position_embeddings", 2048)
    made = train_tokenizer(text.documents, tokenizer.get("vocabulary", 2048), length)
    special = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = LlamaForCausalLM(LlamaConfig(**config, vocab_size=len(made), **special))
        except (ValueError, TypeError, RuntimeError) as error:
            raise SettingError(f"The new model's config does not hold together: {error}. Change its sizes.") from error
    return model.eval(), made


def train_tokenizer(documents: tuple[str, ...], vocabulary: int, length: int) -> Any:
    """A byte-level BPE of `vocabulary` tokens that gives back any text unchanged; `length` is the model's context.

    Token 0 is `<|endoftext|>`, both beginning and end. Raises SettingError below 257, one for each byte and the end.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < 257:
        raise SettingError(f"A vocabulary of {vocabulary} was asked for; a byte-level tokenizer needs at least 257.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=length,
    )
