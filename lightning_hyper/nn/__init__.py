"""Networks: tensors in, tensors out; imports torch and jaxtyping alone."""

from lightning_hyper.nn.conditional import D2RL, MLP, Concat, Conditional, ContextOnly, FiLM, Hyper, grouped
from lightning_hyper.nn.encoders import ConvEncoder, GridEncoder, VectorEncoder
from lightning_hyper.nn.hypernetwork import GeneratedLinear
from lightning_hyper.nn.recurrent import GRU, LSTM
from lightning_hyper.nn.sequence import SequenceEncoder
from lightning_hyper.nn.transformer import Transformer
from lightning_hyper.nn.trunks import MLPTrunk, ResidualTrunk, Trunk

__all__ = [
    "Concat",
    "Conditional",
    "ContextOnly",
    "ConvEncoder",
    "D2RL",
    "FiLM",
    "GRU",
    "GeneratedLinear",
    "GridEncoder",
    "Hyper",
    "LSTM",
    "MLP",
    "MLPTrunk",
    "ResidualTrunk",
    "SequenceEncoder",
    "Transformer",
    "Trunk",
    "VectorEncoder",
    "grouped",
]
