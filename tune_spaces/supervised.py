"""Training on labels: what He et al. 2015, arXiv:1512.03385, fix and others tune."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.supervised.Supervised",),
    params={
        "optim.lr": tune.loguniform(0.002, 0.5),  # 0.1 for 128 images in section 4.2
        "optim.weight_decay": tune.loguniform(1e-6, 1e-2),  # 1e-4 in section 4.2, 5e-4 for wide networks
        "method.label_smoothing": tune.choice([0.0, 0.05, 0.1, 0.2, 0.9]),  # 0.1 in Noisy Student; 0.9 as a control
        "method.augment.randaugment": tune.quniform(0.0, 30.0, 1.0),  # 27 of Noisy Student's largest, 9 for CIFAR-10
    },
)
