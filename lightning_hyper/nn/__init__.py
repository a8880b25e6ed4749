"""Networks: tensors in, tensors out; imports torch alone."""

from lightning_hyper.nn.conditional import D2RL, Concat, Conditional, ContextOnly, FiLM, Hyper, InputOnly
from lightning_hyper.nn.encoders import MLP, GridEncoder, VectorEncoder
from lightning_hyper.nn.hypernetwork import GeneratedLinear
from lightning_hyper.nn.sequence import GRU, LSTM, SequenceEncoder, Transformer
from lightning_hyper.nn.trunks import MLPTrunk, ResidualTrunk, Trunk

__all__ = [
    "Concat",
    "Conditional",
    "ContextOnly",
    "D2RL",
    "FiLM",
    "GRU",
    "GeneratedLinear",
    "GridEncoder",
    "Hyper",
    "InputOnly",
    "LSTM",
    "MLP",
    "MLPTrunk",
    "ResidualTrunk",
    "SequenceEncoder",
    "Transformer",
    "Trunk",
    "VectorEncoder",
]
