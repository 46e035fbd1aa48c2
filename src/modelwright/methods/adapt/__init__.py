"""Adapting: train few parameters beside the frozen ones.

Three formulas: mask ⊙ [(I + Λ) W + s · B C A + scatter] with the bias (I + Λ) b + β; gated sums base(x) + Σ gₖ ⊙ fₖ(x); bottlenecks
U φ(D x). Start with `adapt.lora`. Where few numbers may train: `adapt.svfit`, `adapt.loldu`, `adapt.ssf`, `adapt.ia3`,
`adapt.vera`. Where LoRA learns too slowly: `adapt.lora_ga`, `adapt.dora`, `adapt.hydra`. Where the rank is not known:
`adapt.triadapt`, `adapt.adalora`. Few entries in place of a low rank: `adapt.spiel`, `adapt.shira`, `adapt.dsee`. Sparse in the
end: `adapt.pst`, `adapt.light_peft`. All weights, a few blocks at a time: `adapt.lisa`. Several adapters into one:
`adapt.scalearn`, `adapt.autolora`. As a control: `adapt.apet`. `adapt.lora` and others take packed models too, as in
`recipes/qlora.yaml`. Train them with `train` or `distill.recover`, then keep the adapter, put it into the weights with
`adapt.fold`, or write it as a plain LoRA with `mw.export_adapter`.
"""
