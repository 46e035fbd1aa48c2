"""Quantisation: store weights in fewer bits.

Mechanism: observer → fold → grid → solver → codec. A grid has the points that weights can take, scaled for each `group` of a row's
weights: whole numbers, or levels such as those of NF4; the solver chooses the codes; the codec packs them, as compressed-tensors
does where it has a name for them, so that such models load in plain transformers. `mw.export` writes the layouts of other tools.

How to choose: without text, `quantize.rtn`; 8 bits lose next to nothing, and at 4 bits `grid: nf4` and `quantize.hqq` are better than
plain integers. With text, `quantize.gptq` at 4 bits and fewer: its error on the layers' outputs is smaller at the same size;
`quantize.awq` adapts less to the text, and `quantize.mixed` gives each matrix bits of its own, which pays below 4. Where inputs are to
be rounded too, `quantize.smoothquant` with text and `quantize.llm_int8` without; where the steps of inputs are to be known
beforehand, `quantize.mergequant`; `quantize.rotate` before them spreads what is far out. Below 3 bits a model has to be trained:
`quantize.fairy2i` or `quantize.bitlinear`, then `distill.recover` or `train`, then `quantize.pack`. For accelerators that multiply 4-
or 8-bit floats, `quantize.nvfp4`, `quantize.mxfp4` and `quantize.fp8`. `quantize.bipolar` stores planes of bits, of which the first are
the model in fewer. `quantize.dequantize` gives dense weights again.
"""
