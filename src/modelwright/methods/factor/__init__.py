"""Factorisation: replace a matrix by the product of two thinner ones.

Mechanism: W ≈ B·A under a metric S, the best rank-r fit to W·S. `factor.svd` has S = 1; `factor.svd_llm` takes S from
the inputs, so that the layers' outputs, not the weights, come out closest.

How to choose: `factor.svd_llm` whenever there is text. Both save bytes, memory and time in proportion, and lose more
quality for a saved byte than quantisation does; they earn their place after it, or where integers are not an option.
"""
