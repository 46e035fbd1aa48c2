"""Adapting: train few parameters beside the frozen ones.

Mechanism: mask⊙[(I+Λ)W + s·BCA + scatter]; `adapt.lora` trains B and A. Adapters are those of peft and are saved as
peft adapters. Train them with `train` or `distill.recover`, then keep the adapter or put it into the weights with
`adapt.fold`. `adapt.lora` takes packed models too, after which `train` changes the adapters alone: QLoRA, see `recipes/qlora.yaml`.
"""
