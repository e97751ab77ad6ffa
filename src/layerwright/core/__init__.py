"""The nouns: budgets, plans, treatments, costs, layers and blocks, calibration, scores; and the lockstep walk.

Imports nothing from the other rooms. The package's top level re-exports the names a user needs.
"""
