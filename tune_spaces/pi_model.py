"""Π-model: Laine and Aila 2017, arXiv:1610.02242."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.pi_model.PiModel",),
    params={
        "method.unlabelled_weight": tune.loguniform(0.5, 200.0),  # 100 · M/N in section 2.1; 10 in FixMatch's code
        "method.ramp": tune.quniform(0.05, 1.0, 0.05),  # 80 of 300 epochs in the paper; 0.4 in FixMatch's code
    },
)
