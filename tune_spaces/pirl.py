"""PIRL: Misra and van der Maaten 2020, arXiv:1912.01991."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.pirl.PIRL",),
    params={
        "method.temperature": tune.loguniform(0.03, 1.0),  # 0.07 with 32,000 negatives; fewer want more
        "method.weight": tune.quniform(0.0, 1.0, 0.05),  # λ of eq. 5: the paper tries 0 to 1, 0.5 is best
        "method.negative_count": tune.qlograndint(128, 32768, 128),  # the paper: more is better, up to 32,000
        "method.momentum": tune.quniform(0.0, 0.95, 0.05),  # of the bank; 0.5 in section 3.2
    },
)
