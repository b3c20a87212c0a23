"""Noisy Student: Xie et al. 2020, arXiv:1911.04252. Which pseudo-labels are learned from, and under how much noise."""

from ray import tune

from tune_spaces.space import Space

AUGMENT, DROPOUT = "method.augment.randaugment", "method.dropout"
LADDERS = [
    [],  # every round as the recipe has it
    [{AUGMENT: 3}, {AUGMENT: 5}, {AUGMENT: 9}],  # stronger views of each round: 9 is RandAugment's for CIFAR-10
    [{AUGMENT: 9}, {AUGMENT: 5}, {AUGMENT: 3}],  # and the other way round, as a control
    [{DROPOUT: 0.1}, {DROPOUT: 0.3}, {DROPOUT: 0.5}],  # 0.5 for the paper's largest student
]

SPACE = Space(
    methods=("methods.noisy_student.NoisyStudent",),
    params={
        "PseudoLabel.min_confidence": tune.quniform(0.0, 0.95, 0.05),  # 0.3 in section 3.1; hard labels want 0.8
        "PseudoLabel.balance": tune.choice(["none", "limit", "replicate"]),  # replicate in the paper
        "Rounds.ladder": tune.choice(LADDERS),  # table 6: without noise 0.5 points less
        "unlabelled_ratio": tune.choice([1, 3, 5, 7, 14, 28]),  # 1 to 28 in the paper, by the student's size
    },
)
