"""A method of your own: what a task keeps of the network (docs/plug_ins.md)."""

from supsup_lightning.layout import Layout
from supsup_lightning.methods import TrainedNetworkMethod


class Biases(TrainedNetworkMethod):
    """Each task trains the vectors of a network (biases, gains), over random weights that no task changes."""

    def __init__(self, network, *, seed=0):
        vectors = Layout.choosing(network, lambda name, parameter: parameter.ndim == 1)
        weights = tuple(name for name, _ in network.named_parameters() if name not in vectors.names)
        super().__init__(network, layout=vectors, identified=weights, seed=seed)
