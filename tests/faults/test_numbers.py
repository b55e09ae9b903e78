"""Losses and gradients that are not finite; oracles: the state before the step, a run without.

The fault is a factor of the gradient of one parameter, or a pixel of a batch, at chosen steps.
"""

import train_final
import train_search

MAIN = {"train_search": train_search.main, "train_final": train_final.main}
# Not the first of the network's parameters.
PARAMETERS = {"search": "cells.1.preprocess1.conv.weight", "final": "classifier.weight"}
ROWS = {"search": 3, "final": 6}  # steps of an epoch


class Fault:
    """Multiply the gradient of a parameter at the steps `steps` (from 1, of all epochs)."""

    def __init__(self, parameter, factor, steps):
        self.parameter, self.factor, self.steps, self.done = parameter, factor, steps, 0

    def __call__(self, gradient):
        self.done += 1
        return gradient * self.factor if self.done in self.steps else gradient

    def put_into(self, model):
        dict(model.named_parameters())[self.parameter].register_hook(self)
