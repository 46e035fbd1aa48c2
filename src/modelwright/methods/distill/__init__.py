"""Distillation: train a model towards what a teacher says.

Mechanism: KL(a ‖ w·a + (1-w)·b) of teacher and student, in either order. `distill.recover` brings a compressed model
back towards its original.
"""
