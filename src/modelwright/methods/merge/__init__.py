"""Merging: make one model of several that were fine-tuned from the same one.

Mechanism: θ0 + λ·norm(Σ wᵢ·agree(sparsify(θᵢ − θ0))), tensor by tensor. The model of the recipe is the base θ0; the
donors are the fine-tuned ones.

How to choose: `merge.linear` is the average and hard to beat with strong bases; `merge.ties` keeps donors that
changed different things from cancelling each other. With text of each donor's own, `merge.regmean` and `merge.fisher` weigh
what counts for it. `merge.extract` and `merge.adapters` give low-rank adapters, `merge.moe` keeps all donors as experts, and
`merge.transplant` takes over a tokenizer alone.
"""
