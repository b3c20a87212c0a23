"""Pseudo-labels made while training: Lee 2013, as FixMatch's code has it."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.pseudo_labelling.PseudoLabelling",),
    params={
        "method.min_confidence": tune.quniform(0.3, 0.98, 0.01),  # 0.95 in FixMatch's code
        "method.unlabelled_weight": tune.loguniform(0.1, 10.0),  # 1 in the same code, 3 in Lee 2013
        "method.ramp": tune.quniform(0.05, 1.0, 0.05),  # 0.4 in the same code
    },
)
