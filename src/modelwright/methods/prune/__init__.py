"""Pruning: remove the parts of a model that matter least.

Mechanism: score → allocate → remove → compensate, over a unit: a weight, n of every m weights, a neuron, a head, an
expert, or a whole block.

How to choose: without text, `prune.magnitude`. With text, `prune.sparsegpt` keeps the most quality of the
weight pruners, `prune.wanda` is faster and needs less memory. Zeros save bytes on disk only when they are stored
sparse (`store: sparse`), and no time. What saves bytes, memory and time is to take units out: `prune.flap` heads and
neurons without training, `prune.llm_pruner` the same by gradients before some training, `prune.adapt_pruner` in many
small steps, `prune.shortgpt` whole blocks, `prune.blockpruner` single attentions and MLPs, `prune.reap` experts, and
`prune.slicegpt` directions of the stream between the blocks.
"""
