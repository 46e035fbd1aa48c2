"""Quantisation: store weights in fewer bits.

Mechanism: observer → fold → grid → solver → codec. The grid here is of integers with one scale for each `group` of
a row's weights; the solver chooses the codes; the codec packs them as compressed-tensors does, so that symmetric
models load in plain transformers.

How to choose: without text, `quantize.rtn`; 8 bits lose next to nothing. With text, `quantize.gptq` at 4 bits and
fewer: its error on the layers' outputs is smaller at the same size.
"""
