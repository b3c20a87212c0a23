"""Jigsaw puzzles: Noroozi and Favaro 2016, arXiv:1603.09246; jigsaw++: Noroozi et al. 2018, arXiv:1805.00385."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.jigsaw.Jigsaw", "methods.jigsaw.JigsawPlus"),
    params={
        "method.permutations": tune.choice([4, 8, 16, 24, 30]),  # harder is not better; a grid of 2 has 24 orders
        "method.grid": tune.choice([2, 3]),  # 3 in the paper, of images of 225 pixels; 2 where they are small
        "method.grey": tune.quniform(0.0, 1.0, 0.05),  # 0.3 to 0.7 in the papers: colour gives the answer away
    },
)
