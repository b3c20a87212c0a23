"""UDA: Xie et al. 2020, arXiv:1904.12848."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.uda.UDA",),
    params={
        "method.min_confidence": tune.quniform(0.3, 0.98, 0.01),  # β: 0.8 in section 2.4, 0.95 in FixMatch's code
        "method.temperature": tune.quniform(0.3, 1.0, 0.05),  # 0.4 in section 2.4; 1 leaves the target as it is
        "method.unlabelled_weight": tune.loguniform(0.1, 10.0),  # λ is 1, section 2.1
        "method.annealing": tune.choice(["none", "log", "linear", "exp"]),  # section 2.5: by how many labels there are
        "unlabelled_ratio": tune.randint(1, 16),  # section 4: 15 for CIFAR-10
    },
)
