"""VAT: Miyato et al. 2018, arXiv:1704.03976."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.vat.VAT",),
    params={
        "method.epsilon": tune.loguniform(0.3, 20.0),  # ε is what the paper tunes for each data set
        "method.unlabelled_weight": tune.loguniform(0.05, 2.0),  # 1 in the paper, 0.3 in FixMatch's code
        "method.entropy_weight": tune.choice([0.0, 0.03, 0.06, 0.1, 0.3, 1.0]),  # the paper has 0 or 1
    },
)
