"""Mean Teacher: Tarvainen and Valpola 2017, arXiv:1703.01780."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    methods=("methods.mean_teacher.MeanTeacher",),
    params={
        "method.unlabelled_weight": tune.loguniform(1.0, 300.0),  # figure 4: two orders are good; 50 in FixMatch's code
        "method.ramp": tune.quniform(0.05, 1.0, 0.05),  # figure 4: a ramp-up helps; 0.4 in FixMatch's code
        "ema": tune.choice([0.9, 0.99, 0.995, 0.999, 0.9995, 0.9999]),  # figure 4: 0.99 to 0.999 are best
    },
)
