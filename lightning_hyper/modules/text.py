"""Sentence embeddings of missions: those that are shipped, and those of any sentence-transformers model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_hyper.checks import RecipeError

SHIPPED = Path(__file__).with_name("missions.npz")


def embed_missions(missions: Sequence[str], encoder: str) -> Tensor:
    """Embedding of each mission, `[missions, features]`.

    The missions of the shipped task sets come with the package for the encoder all-MiniLM-L6-v2; others need the
    extra `text`.

    Args:
        missions: texts.
        encoder: name of a sentence-transformers model, or a folder that holds one.

    Raises:
        RecipeError: an embedding is not shipped, and the encoder is not installed or cannot be found.
    """
    texts, features, name = _shipped()
    if encoder == name and set(missions) <= texts.keys():
        return torch.from_numpy(features[[texts[mission] for mission in missions]]).float()
    missing = next((m for m in missions if m not in texts), missions[0])
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise RecipeError(
            f"model.context.encoder: no embedding of the mission {missing!r} by {encoder!r} comes with the package; "
            "install lightning-hyper[text] to make it"
        ) from error
    try:
        model = SentenceTransformer(encoder, device="cpu")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"model.context.encoder is {encoder!r}, which is neither a folder with a sentence-transformers model nor "
            f"the name of one that can be fetched ({str(error).splitlines()[0]})"
        ) from error
    return torch.as_tensor(model.encode(list(missions), normalize_embeddings=True)).float()


def _shipped() -> tuple[dict[str, int], np.ndarray, str]:
    with np.load(SHIPPED) as stored:
        texts = json.loads(bytes(stored["texts"]).decode())
        return {text: k for k, text in enumerate(texts)}, stored["embeddings"], str(stored["encoder"])


def ship(encoder: str, model: str) -> None:
    """Write the file of embeddings that comes with the package: every mission of the shipped task sets.

    Args:
        encoder: name by which recipes ask for it.
        model: name or folder by which sentence-transformers finds it.
    """
    from sentence_transformers import SentenceTransformer

    from lightning_hyper.envs.minigrid import SETS
    from lightning_hyper.envs.minigrid_package import describe

    ids = dict.fromkeys(task for tasks in SETS.values() for task in tasks)
    texts = list(dict.fromkeys(text for task in ids for text in describe(task).missions))
    embeddings = SentenceTransformer(model, device="cpu").encode(texts, normalize_embeddings=True)
    listed = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    halves = np.asarray(embeddings, np.float16)
    np.savez_compressed(SHIPPED, texts=listed, embeddings=halves, encoder=np.array(encoder))


if __name__ == "__main__":
    ship(*sys.argv[1:])
