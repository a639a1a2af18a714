"""The mathematics: tensors (or arrays) in, the same out, per example and unreduced; one paper family a file.

Nothing is imported here, so that `functional.overoptimization` and `functional.best_of_n` load without torch.
"""
