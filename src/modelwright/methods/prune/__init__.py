"""Pruning: remove the parts of a model that matter least.

Mechanism: score → allocate → remove → compensate, over a unit: a weight, n of every m weights, a neuron, a head, an
expert, or a whole block.

How to choose: without text, `prune.magnitude`. With text, `prune.alps` and `prune.sparsegpt` keep the most quality of the
weight pruners, the first closer to each layer's outputs and slower. `prune.wanda` and `prune.ria` are faster and need
less memory; `prune.gaprune` keeps what a domain's text needs more than general text does. For n:m patterns `prune.ria`
may permute inputs first, which keeps more of its score. Any weight pruner may take more from some matrices than from
others: `allocate: owl` less from blocks whose scores have outliers, for high sparsity, and of a pattern too; `allocate: erk`
less from small and thin matrices, without text, and `allocate: even` leaves as many weights in each. Zeros save bytes on
disk only when they are stored sparse (`store: sparse`), and no time. Where there is time to train, `prune.gradual` zeroes
little by little while the rest learns. `prune.armor` stores a 2:4 core between two block-diagonal matrices, which its paper
found closer to the matrix than a pattern alone.

What saves bytes, memory and time is to take units out: `prune.flap` heads and neurons without training,
`prune.llm_pruner` the same by gradients before some training, `prune.adapt_pruner` in many small steps,
`prune.prunenet` neurons by the weights alone, `prune.shortgpt` whole blocks, `prune.blockpruner` single attentions and
MLPs, `prune.das` the same with small adapters in their places, `prune.reap` experts, and `prune.slicegpt` directions of
the stream between the blocks, with one basis for a plain model, or closer with one for each norm and matrices between them.
Where a model is to be tuned to a text anyway, it can lose units on the way and learn to do without them: `prune.loraprune`
heads and neurons beside low-rank updates, and `prune.pat` channels of the stream, which it mixes first. A model that bears an
adapter already can lose weights under it, `prune.dsee`, or heads, `prune.dsee_heads`, and then have the adapter tuned on.
`prune.efficientllm` takes out units little by little while all weights train, for long runs, and `prune.adapt_accel` in rounds,
fewer from blocks that do more.

Of convolutional networks the channels inside blocks are units too (`units: [channels]`), and those of whole stages
(`stages`), as far as torch.fx can follow what the network does: `prune.llm_pruner` takes them out by the loss of labelled images.
`prune.precropping` makes such a network narrower before it is trained.

What is left out at run time, by what a token needs: `prune.activations` neurons whose contributions are small, which
measures how sparse a model's activations are; `prune.ftp` whole blocks, for tokens that small routers choose.
"""
