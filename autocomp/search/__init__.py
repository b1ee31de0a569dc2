"""Search: encode the space, seed by MILP, evolve by swap-and-repair, screen, propose trials.

Torch-free and worker-free: evaluations are callables, costs come through the `Predictor` protocol.
"""
