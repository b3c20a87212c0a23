"""ReMixMatch: Berthelot et al. 2020, arXiv:1911.09785."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.remixmatch.ReMixMatch",),
    params={
        "method.temperature": tune.quniform(0.1, 1.0, 0.05),  # 0.5, section 4
        "method.alpha": tune.quniform(0.1, 1.0, 0.05),  # 0.75, section 4
        "method.unlabelled_weight": tune.loguniform(0.1, 20.0),  # λ_U is 1.5, section 4
        "method.strong_weight": tune.loguniform(0.05, 5.0),  # λ_Û1 is 0.5, section 4
        "method.rotation_weight": tune.loguniform(0.05, 5.0),  # λ_r is 0.5, section 4
        "method.ramp": tune.loguniform(0.01, 1.0),  # 1/64 of a long training
    },
)
