"""Factorisation: replace a matrix by the product of two thinner ones.

Mechanism: W ≈ B·A under a metric S, the best rank-r fit to W·S. `factor.svd` has S = 1; `factor.svd_llm` takes S from
the inputs, so that the layers' outputs, not the weights, come out closest; `factor.asvd` takes a diagonal from them, and asks
the text's perplexity how much each matrix keeps. `factor.tensor` is for weights of more ways: kernels, and tables folded into
a tensor, as CP, Tucker or tensor trains.

How to choose: `factor.svd_llm` whenever there is text; `factor.asvd` where matrices differ much in what they stand, and there is
time for a pass of the text for each matrix and share; `factor.pela` where there is time to train: it factors and then distils
from the original; `factor.tensor` for convolutions, and for embeddings that are not tied to the head. All save bytes and memory,
and time in proportion; but the folded matrices and tables of `factor.tensor` take longer than dense ones. They lose more quality
for a saved byte than quantisation does, and earn their place before it, as factors that are then quantised, or where integers are
not an option.
"""
