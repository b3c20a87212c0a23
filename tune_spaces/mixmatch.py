"""MixMatch: Berthelot et al. 2019, arXiv:1905.02249."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.mixmatch.MixMatch",),
    params={
        "method.temperature": tune.quniform(0.1, 1.0, 0.05),  # 0.5, section 3.4; table 4: 1 is much worse
        "method.alpha": tune.quniform(0.1, 1.0, 0.05),  # section 3.4 advises 0.75 and to tune it with the weight
        "method.unlabelled_weight": tune.loguniform(1.0, 250.0),  # section 4.2: 75 for CIFAR-10, 250 for SVHN
        "method.ramp": tune.loguniform(0.01, 1.0),  # 1/64 of a long training; a short one wants 0.4
    },
)
