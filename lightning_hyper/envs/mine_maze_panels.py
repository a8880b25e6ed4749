"""Panels of the mine mazes, one for each view: from blocks with textures of our own, or pictures from a folder.

Source: Beck et al. 2020 (AMRL), whose screenshots have these names and are taken from these places.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_hyper.checks import RecipeError

Panels = NDArray[np.uint8]

CELLS = ((0, 0), (0, 1), (-1, 1), (1, 1), (-1, 2), (1, 2), (-1, 3), (1, 3), (0, 3))  # of a room
NAMES = ("green", "red", "end", *(f"room{kind}/{x},{y}" for kind in (0, 1) for x, y in CELLS))
# SHA-256 of the published pixels in the order of NAMES, by size.
PUBLISHED = {
    10: "1b870f3e393bd1e54abfb43958e8462ff167a73c83b8d5e46080ddeb6687ca57",
    42: "e28acc1eb9f51db6037cbf28acd82f9520d830ccf371ca13ad0316d04635d9cf",
}


@dataclass(frozen=True)
class Block:
    """How a block's 16x16 texture is made: grains of one shade, spots, and a rim."""

    colour: tuple[int, int, int]
    contrast: float
    grains: tuple[int, int] = (16, 8)  # rows and columns
    spots: int = 0
    spot: tuple[int, int, int] = (0, 0, 0)
    rim: float = 1.0


BLOCKS = {
    "bedrock": Block((80, 80, 80), 45, (8, 8)),
    "cobblestone": Block((96, 96, 96), 42, (8, 8)),
    "stone": Block((124, 124, 124), 14),
    "iron": Block((222, 222, 222), 10, (8, 1), rim=0.85),
    "diamond": Block((125, 220, 215), 22, (4, 4), rim=0.7),
    "diamond ore": Block((124, 124, 124), 14, spots=7, spot=(95, 210, 220)),
    "iron ore": Block((124, 124, 124), 14, spots=7, spot=(190, 150, 125)),
    "emerald": Block((70, 205, 110), 25, (4, 4)),
    "redstone": Block((165, 25, 10), 40, (8, 8)),
    "obsidian": Block((20, 18, 30), 10, (8, 4), spots=5, spot=(60, 48, 85)),
}
SKY = (140, 168, 255)
SHADE = np.array([0.6, 1.0, 0.8])  # of a block's sides, its top, and its front
EYE, VIEW = 1.62, math.radians(70)  # height over the feet, and vertical angle of view
# Blocks are kept as [x, y, z] from here: x to the left, y up, z forward.
CORNER, EXTENT = np.array([-3, 224, -2]), (7, 13, 9)
# Where one stands in each cell: x, height of the feet, z.
STANDS = (
    *((0, 228, -1), (0, 229, 0), (1, 227, 0), (-1, 227, 0), (1, 228, 1), (-1, 228, 1)),
    *((1, 229, 2), (-1, 229, 2), (0, 227, 2)),
)


@cache
def voxel_panels(size: int) -> Panels:
    """Our own panels, `[21, size, size, 3]`, uint8, in the order of `NAMES`; made once and kept.

    They have the geometry of the published screenshots and procedural textures: not Minecraft's imagery.
    """
    textures = np.stack([_texture(k, block) for k, block in enumerate(BLOCKS.values())])
    fine = -(-80 // size)  # rays along a side of a pixel

    def seen(world: NDArray[np.int64], x: int, feet: int, z: int) -> NDArray[Any]:
        picture = _look(world, np.array([x + 0.5, feet + EYE, z + 0.5]), size * fine, textures)
        coarse: NDArray[Any] = picture.reshape(size, fine, size, fine, 3).mean((1, 3))
        return coarse

    views = [seen(_wall(block), 0, 228, 0) for block in ("emerald", "redstone", "obsidian")]
    views += [seen(world, *stand) for world in (_room("iron"), _room("diamond")) for stand in STANDS]
    panels = np.stack(views).round().astype(np.uint8)
    panels.setflags(write=False)
    return panels


def folder_panels(folder: str, size: int) -> Panels:
    """Panels from a folder's `green.png`, `red.png`, `end.png` and `room{0,1}/x,y.png`, as `voxel_panels` has them.

    Raises:
        RecipeError: a file is missing, is no picture, or has another size.
    """
    pictures = []
    for name in NAMES:
        file, fault = Path(folder).expanduser() / f"{name}.png", ""
        try:
            with Image.open(file) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        except FileNotFoundError:
            fault = f"lacks {name}.png: it must hold {', '.join(NAMES[:3])} and room0 and room1 of 9 files each"
        except OSError:
            fault = f"has a {name}.png that is no picture"
        else:
            if (shape := pictures[-1].shape) != (size, size, 3):
                fault = f"has a {name}.png of {shape[1]}x{shape[0]} pixels; data.env.size asks for {size}x{size}"
        if fault:
            raise RecipeError(f"data.env.panels: the folder {folder} {fault}")
    return np.stack(pictures)


def are_published(panels: Panels) -> bool:
    """Whether these are the published screenshots, pixel by pixel."""
    return hashlib.sha256(np.ascontiguousarray(panels).tobytes()).hexdigest() == PUBLISHED.get(panels.shape[1])


def _texture(seed: int, block: Block) -> NDArray[Any]:
    """Colours `[16, 16, 3]`, the top row first."""
    random = np.random.default_rng(seed)
    rows, columns = block.grains
    grains = np.kron(random.uniform(-1, 1, block.grains), np.ones((16 // rows, 16 // columns)))
    texture: NDArray[Any] = np.array(block.colour) + block.contrast * grains[..., None]
    for row, column in random.integers(0, 14, (block.spots, 2)):
        texture[row : row + 2, column : column + 3] = np.array(block.spot) + random.uniform(-25, 25)
    inside = np.full((16, 16, 1), block.rim)
    inside[1:-1, 1:-1] = 1
    texture *= inside
    return texture.clip(0, 255)


def _put(world: NDArray[np.int64], block: str, *ranges: tuple[int, int]) -> None:
    """Fill blocks from the first to the last of each range over x, y and z."""
    first, last = np.array(ranges).T
    low, high = first - CORNER, last - CORNER + 1
    world[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = list(BLOCKS).index(block)


def _wall(block: str) -> NDArray[np.int64]:
    world = np.full(EXTENT, -1)
    _put(world, block, (-2, 2), (227, 233), (1, 1))
    return world


def _room(pillar: str) -> NDArray[np.int64]:
    """A room whose first cell is at z -1, closed at its end."""
    world = np.full(EXTENT, -1)
    _put(world, "bedrock", (-1, 1), (225, 226), (-2, 6))
    for side in (-2, 2):
        _put(world, "cobblestone", (side, side), (227, 230), (-2, 6))
    _put(world, pillar, (0, 0), (227, 231), (1, 1))
    _put(world, "stone", (0, 0), (228, 228), (0, 0))
    for side, ore in ((1, "diamond ore"), (-1, "iron ore")):
        _put(world, "stone", (side, side), (227, 227), (1, 1))
        _put(world, "stone", (side, side), (228, 228), (2, 2))
        _put(world, ore, (side, side), (227, 231), (3, 3))
    _put(world, "stone", (0, 0), (227, 227), (3, 3))
    _put(world, "stone", (0, 0), (228, 231), (4, 4))
    return world


def _look(world: NDArray[np.int64], eye: NDArray[Any], size: int, textures: NDArray[Any]) -> NDArray[Any]:
    """What is seen from a place forward, `[size, size, 3]`: each ray goes from block to block until one is filled."""
    aside = ((np.arange(size) + 0.5) / size * 2 - 1) * math.tan(VIEW / 2)
    down, right = np.meshgrid(aside, aside, indexing="ij")
    ray = np.stack((-right, -down, np.ones_like(right)), -1).reshape(-1, 3)
    ray[ray == 0] = 1e-9
    colours = np.broadcast_to(np.array(SKY, float), ray.shape).copy()
    cell, forward = np.tile(np.floor(eye).astype(int), (len(ray), 1)), np.sign(ray).astype(int)
    # How far along its ray the next face across each axis lies.
    ahead = (cell + (forward > 0) - eye) / ray
    going = np.arange(len(ray))
    while len(going):
        axis, row = ahead[going].argmin(1), np.arange(len(going))
        distance = ahead[going, axis]
        cell[going, axis] += forward[going, axis]
        ahead[going, axis] += 1 / abs(ray[going, axis])
        where = cell[going] - CORNER
        inside = ((where >= 0) & (where < EXTENT)).all(1)
        block = np.where(inside, world[tuple(np.where(inside[:, None], where, 0).T)], -1)
        hit = block >= 0
        x, y, z = np.floor((eye + distance[hit, None] * ray[going[hit]]) % 1 * 16).astype(int).clip(0, 15).T
        face = axis[row[hit]]
        texel = textures[block[hit], np.where(face == 1, z, 15 - y), np.where(face == 0, z, 15 - x)]
        colours[going[hit]] = texel * SHADE[face, None]
        going = going[inside & ~hit]
    return colours.reshape(size, size, 3)
