"""FixMatch: Sohn et al. 2020, arXiv:2001.07685."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.fixmatch.FixMatch", "methods.fixmatch.FixMatchCTA"),
    params={
        "method.min_confidence": tune.quniform(0.5, 0.98, 0.01),  # figure 3 varies it; short runs want less
        "method.unlabelled_weight": tune.loguniform(0.1, 10.0),  # λ_u is 1, table 4; the kin have up to 75
        "unlabelled_ratio": tune.randint(1, 8),  # μ: figure 3 varies it; 7 in the paper, at the cost of as many images
    },
)
