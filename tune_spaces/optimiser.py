"""Learning rate and weight decay, of every training: what matters most and transfers least."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    params={
        "optim.lr": tune.loguniform(1e-4, 10.0),  # AdamW has 1e-3, SGD 0.1, LARS 1 and more
        "optim.weight_decay": tune.loguniform(1e-6, 1e-2),  # 5e-4 for small networks with SGD; papers have 1e-6 to 5e-4
    },
)
