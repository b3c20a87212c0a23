"""Distillation: Hinton et al. 2015, arXiv:1503.02531; who may teach whom: Yuan et al. 2020, arXiv:1909.11723."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.distillation.Distillation",),
    params={
        "method.temperature": tune.loguniform(1.0, 20.0),  # Hinton: 1 to 20, and 2.5 to 4 for narrow students; Yuan: 20
        "method.alpha": tune.quniform(0.1, 0.95, 0.05),  # Yuan: 0.4 to 0.95, which weigh 0.1 to 0.9
    },
)
