"""Encoding: the same values, or nearly, in fewer bytes.

Mechanism: tensors → symbols → an entropy code. `encode.dfloat11` codes the exponents of weights and leaves every bit as it was;
`encode.compeft` and `encode.fedzip` take the difference of a fine-tuned model from its base to three levels, and code where they stand;
`encode.bitstack` stores weights in terms, of which first ones are the weights more roughly.

How to choose: `encode.dfloat11` costs no quality at all, and takes a third off bfloat16; it comes last, since what is coded cannot be
changed any more. Where one file is to serve devices with different memory, `encode.bitstack`: `modelwright.resize` loads what fits a
budget of bytes, and more or less of it later, at about a bit for each weight and term. For a fine-tuned model whose base the user has,
`modelwright.pack_delta` stores the difference alone, by the codec of `encode.compeft`, one threshold and one size for all tensors, or
of `encode.fedzip`, its own levels for each tensor; as steps they give the model that comes back, to measure what it costs.
`modelwright.compress` codes the floats of any safetensors checkpoint for the way to somewhere else.
"""
