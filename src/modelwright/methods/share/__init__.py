"""Sharing: store fewer values than the model has weights.

Mechanism: W = R·ψ, where R is a fixed map from the stored values ψ to the weights. `share.depth` has an R that picks whole blocks:
consecutive ones use the same weights. `share.foldgpt` first learns which blocks can leave. `share.roast` has one that hashes
single weights, and `share.graphhash` one that picks whole rows of an embedding: tokens of a community share one.

How to choose: sharing saves bytes and no time, for every place still multiplies. It costs a trained model much at once, so that
training (`distill.recover`, or `adapt.lora` at every place) belongs after it. `share.depth` suits deep models, whose middle
blocks are alike; each use of a block may have scalars and a small projection of its own, which learn in that training.
`share.foldgpt` suits models where some blocks may go altogether, which saves time too. `share.roast` takes any rate, and leaves a
trained model little of what it knew: it is for long training. `share.graphhash` is for large vocabularies whose head is not tied.
"""
