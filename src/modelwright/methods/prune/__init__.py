"""Pruning: remove the parts of a model that matter least.

Mechanism: score → allocate → remove → compensate, over a unit: a weight, n of every m weights, or a whole block.

How to choose: without text, `prune.magnitude`. With text, `prune.sparsegpt` keeps the most quality of the
weight pruners, `prune.wanda` and `prune.ria` are faster and need less memory; with n:m patterns `prune.ria` may
permute inputs first, which keeps more. Zeros save bytes on disk only when they are stored
sparse (`store: sparse`), and no time. Any weight pruner may take more from some matrices than from others: `allocate: owl`
less from blocks whose scores have outliers, which helps most from 60 % on; `allocate: erk` less from small and thin
matrices, without text. `prune.shortgpt` removes whole blocks, which saves bytes, memory and time.
"""
