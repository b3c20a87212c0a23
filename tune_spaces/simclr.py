"""SimCLR: Chen et al. 2020, arXiv:2002.05709."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.simclr.SimCLR",),
    params={
        "method.temperature": tune.loguniform(0.05, 1.0),  # table 5 tries 0.05, 0.1, 0.5 and 1
        "method.jitter": tune.quniform(0.0, 1.0, 0.05),  # table 1: 1/8 to 1; 0.5 for CIFAR-10; 0 is none
        "method.min_area": tune.loguniform(0.08, 0.5),  # 0.08 in appendix A; short runs want easier crops
        "optim.lr": tune.loguniform(0.01, 10.0),  # appendix B.9: 0.5 to 1.5 with LARS; SGD wants a tenth of it
    },
)
