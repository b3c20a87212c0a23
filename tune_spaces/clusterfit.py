"""ClusterFit: Yan et al. 2020, arXiv:1912.03330; and clusters as labels of Noroozi et al. 2018, arXiv:1805.00385."""

from ray import tune

from tune_spaces.space import Space

SPACE = Space(
    params={
        "Cluster.clusters": tune.lograndint(10, 1001),  # 1 to 100 times ten classes; 16 times in the paper
    },
)
