"""Distillation without a teacher, Tf-KD: Yuan et al. 2020, arXiv:1909.11723."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.distillation.VirtualTeacher",),
    params={
        "method.temperature": tune.loguniform(1.0, 40.0),  # published: 10 to 40
        "method.alpha": tune.quniform(0.05, 0.95, 0.05),  # published: 0.1
        "method.correct": tune.quniform(0.9, 0.99, 0.01),  # the paper: at least 0.9; the released code 0.99
    },
)
