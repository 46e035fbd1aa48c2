"""Shaping: look for the sizes that a model of a given budget should have.

Mechanism: a space of sizes, a cost, a searcher. `shape.compressor` looks for the Llama of a given number of parameters that does the
most work for each token, and puts a fresh one in the model's place; `distill.recover` with the original as teacher then teaches it.
"""
