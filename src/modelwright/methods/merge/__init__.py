"""Merging: make one model of several that were fine-tuned from the same one.

Mechanism: θ0 + λ·norm(Σ wᵢ·agree(sparsify(θᵢ − θ0))), tensor by tensor. The model of the recipe is the base θ0; the
donors are the fine-tuned ones.

Between few models as they are: `merge.linear`, `merge.slerp` and the other spherical means, `merge.passthrough`.

How to choose: `merge.linear` is the average and hard to beat with strong bases; `merge.model_stock` finds by itself how far
to go towards it; `merge.ties` keeps donors that changed different things from cancelling each other, `merge.consensus` adds
only what several need (`merge.tall_masks` finds on text what each needs), `merge.ram` leaves whole what one alone changed, and
`merge.lines` spares the first blocks. `merge.slerp` is for two models that differ much. With text, `merge.regmean` and
`merge.fisher` weigh what counts for each donor, and `merge.soup` and `merge.evolve` search the weights.
`merge.extract` and `merge.adapters` give low-rank adapters, `merge.moe` keeps all donors as experts, and `merge.transplant`
takes over a tokenizer alone.
"""
