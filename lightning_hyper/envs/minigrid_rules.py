"""MiniGrid's rules as tables: what a step does, what an agent sees, and how a level is written down."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from minigrid import envs as package
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.minigrid_env import MiniGridEnv
from torch import Tensor

from lightning_hyper.envs.minigrid_package import ACTIONS, VIEW, Task

LEFT, RIGHT, FORWARD, PICK_UP, DROP, TOGGLE, DONE = range(ACTIONS)
COLOURS = range(len(COLOR_TO_IDX))
UNSEEN, EMPTY, WALL, FLOOR, DOOR, KEY, BALL, BOX, GOAL, LAVA = (
    OBJECT_TO_IDX[kind] for kind in ("unseen", "empty", "wall", "floor", "door", "key", "ball", "box", "goal", "lava")
)
OPEN, CLOSED, LOCKED = range(3)
# What a cell or an object means to its task: nothing, what brings success, what ends without it.
PLAIN, RIGHT_ONE, WRONG_ONE = range(3)
# Content of a box that is empty; others hold a key, and this is its colour.
NO_KEY = -1

# Each code is (kind, colour, state, key inside, meaning). Those that hide what is behind them come last.
Cell = tuple[int, int, int, int, int]
THINGS = [(kind, colour, 0, NO_KEY) for kind in (KEY, BALL, BOX) for colour in COLOURS]
FULL_BOXES = [(BOX, colour, 0, key) for colour in COLOURS for key in COLOURS]
CLEAR: list[Cell] = [
    (UNSEEN, 0, 0, NO_KEY, PLAIN),
    *((EMPTY, 0, 0, NO_KEY, meaning) for meaning in (PLAIN, RIGHT_ONE, WRONG_ONE)),
    *((*thing, meaning) for meaning in (PLAIN, RIGHT_ONE) for thing in THINGS),
    *((*box, PLAIN) for box in FULL_BOXES),
    *((FLOOR, colour, 0, NO_KEY, PLAIN) for colour in COLOURS),
    (GOAL, COLOR_TO_IDX["green"], 0, NO_KEY, PLAIN),
    (LAVA, COLOR_TO_IDX["red"], 0, NO_KEY, PLAIN),
    *((DOOR, colour, OPEN, NO_KEY, PLAIN) for colour in COLOURS),
]
CELLS = [
    *CLEAR,
    *((DOOR, colour, state, NO_KEY, PLAIN) for state in (CLOSED, LOCKED) for colour in COLOURS),
    (WALL, COLOR_TO_IDX["grey"], 0, NO_KEY, PLAIN),
]
CODE = {cell: code for code, cell in enumerate(CELLS)}
NOTHING = CODE[EMPTY, 0, 0, NO_KEY, PLAIN]
WALL_CODE = len(CELLS) - 1

# The rules of a task, and where they depend on what was done before, how far it has come.
REACH, FETCH_ONE, FETCH_FIRST, UNLOCK, MATCH, RED_SHUT, RED_OPEN, FAR, NEAR = range(9)
# By the function that steps the package's environment, so that a subclass with a step of its own is not covered.
RULES: dict[Any, int] = {
    MiniGridEnv.step: REACH,
    package.UnlockPickupEnv.step: FETCH_ONE,
    package.BlockedUnlockPickupEnv.step: FETCH_ONE,
    package.KeyCorridorEnv.step: FETCH_ONE,
    package.ObstructedMazeEnv.step: FETCH_ONE,
    package.FetchEnv.step: FETCH_FIRST,
    package.UnlockEnv.step: UNLOCK,
    package.MemoryEnv.step: MATCH,
    package.RedBlueDoorEnv.step: RED_SHUT,
    package.GoToDoorEnv.step: FAR,
    package.GoToObjectEnv.step: FAR,
}
# A mode is a rule with what the agent carries. Boxes with keys only where they occur, so that a byte holds a mode.
BOXED = [CODE[*box, PLAIN] for box in FULL_BOXES]
ALL_THINGS = [NOTHING, *(CODE[*thing, PLAIN] for thing in THINGS)]
HANDS = {rule: [*ALL_THINGS, *BOXED] if rule in (REACH, FETCH_ONE) else ALL_THINGS for rule in range(9)}
HANDS[MATCH] = [NOTHING]
MODES = [(rule, hand) for rule in range(9) for hand in HANDS[rule]]
MODE = {mode: index for index, mode in enumerate(MODES)}


def covers(task: Task) -> bool:
    """Whether this engine knows the rules of a task."""
    kind = type(task.make())
    own = (kind._reward, kind.gen_obs, kind.gen_obs_grid)
    return kind.step in RULES and own == (MiniGridEnv._reward, MiniGridEnv.gen_obs, MiniGridEnv.gen_obs_grid)


@cache
def transitions() -> Tensor:
    """What a step does, `[actions * cells * modes, 3]`, int64, for each action, cell ahead and mode.

    The mode after; quarter turns to the right; and eight bytes: whether it succeeded as a float32, the cell ahead
    after, what the agent carries, whether it moved, whether the episode terminated.
    """
    action = torch.arange(ACTIONS).view(-1, 1, 1)
    cell = torch.arange(len(CELLS)).view(1, -1, 1)
    kind, colour, state, inside, meaning = torch.tensor(CELLS).T.unsqueeze(-1)
    rule, hand = torch.tensor(MODES).T
    held_kind, held_colour = torch.tensor(CELLS)[hand].T[:2]

    def among(values: Tensor, *wanted: int) -> Tensor:
        return torch.isin(values, torch.tensor(wanted))

    going, match = among(rule, FAR, NEAR), rule == MATCH
    thing, empty = among(kind, KEY, BALL, BOX), kind == EMPTY
    right, wrong = meaning == RIGHT_ONE, meaning == WRONG_ONE
    toggles = (action == TOGGLE) | ((action == PICK_UP) & match)
    picks = (action == PICK_UP) & ~match & thing & (hand == NOTHING)
    drops = (action == DROP) & empty & (hand != NOTHING)
    moves = (action == FORWARD) & (among(kind, EMPTY, FLOOR, GOAL, LAVA) | ((kind == DOOR) & (state == OPEN)))
    key_fits = (held_kind == KEY) & (held_colour == colour)
    opens = toggles & (kind == DOOR) & ((state == CLOSED) | ((state == LOCKED) & key_fits))
    closes = toggles & (kind == DOOR) & (state == OPEN)
    unpacks = toggles & (kind == BOX)

    def code(of: Callable[[Cell], Cell]) -> Tensor:
        """The code that each cell turns into, `[cells, 1]`; itself where there is no such cell."""
        return torch.tensor([CODE.get(of(each), CODE[each]) for each in CELLS]).unsqueeze(-1)

    # Near a goal it is the place that means something, elsewhere the thing.
    left = torch.where(going, code(lambda c: (EMPTY, 0, 0, NO_KEY, c[4])), NOTHING)
    unpacked = torch.where(inside == NO_KEY, left, code(lambda c: (KEY, c[3], 0, NO_KEY, PLAIN)))
    marked = torch.tensor([CODE.get((*cell[:4], RIGHT_ONE), i) for i, cell in enumerate(CELLS)])[hand]
    after = cell.expand(ACTIONS, -1, len(MODES))
    for where, new in (
        (picks, left),
        (drops, torch.where(going & right, marked, hand)),
        (opens, code(lambda c: (*c[:2], OPEN, *c[3:]))),
        (closes, code(lambda c: (*c[:2], CLOSED, *c[3:]))),
        (unpacks, unpacked),
    ):
        after = torch.where(where, new, after)
    carried = torch.where(picks, code(lambda c: (*c[:4], PLAIN)), hand.expand_as(after)).masked_fill(drops, NOTHING)
    red = colour == COLOR_TO_IDX["red"]
    rule_after = rule.expand_as(after).clone()
    rule_after[opens & red & (rule == RED_SHUT)] = RED_OPEN
    rule_after[closes & red & (rule == RED_OPEN)] = RED_SHUT
    rule_after[moves & going] = FAR
    rule_after[moves & going & right] = NEAR
    mode_of = torch.zeros(9, len(CELLS), dtype=torch.int64)
    mode_of[rule, hand] = torch.arange(len(MODES))

    goes = action == FORWARD
    blue_opens = opens & (colour == COLOR_TO_IDX["blue"])
    one, first = picks & (rule == FETCH_ONE), picks & (rule == FETCH_FIRST)
    success = (goes & (kind == GOAL)) | ((one | first | (moves & match)) & right) | (opens & (rule == UNLOCK))
    success = success | (blue_opens & (rule == RED_OPEN)) | ((action == DONE) & (rule == NEAR))
    failure = (goes & (kind == LAVA)) | (first & ~right) | (moves & match & wrong) | (blue_opens & (rule == RED_SHUT))
    failure = failure | ((action == TOGGLE) & going) | ((action == DONE) & (rule == FAR))
    turns = torch.where(action == RIGHT, 1, torch.where(action == LEFT, 3, 0)).expand_as(after)
    bytes_after = [each.expand_as(after).to(torch.uint8) for each in (after, carried, moves, success | failure)]
    paid = success.expand_as(after).to(torch.float32).unsqueeze(-1).view(torch.uint8)
    packed = torch.cat((paid, torch.stack(bytes_after, -1)), -1).view(torch.int64)
    return torch.cat((mode_of[rule_after, carried].unsqueeze(-1), turns.unsqueeze(-1), packed), -1).flatten(0, -2)


@cache
def sight() -> tuple[Tensor, Tensor]:
    """The rule of visibility, one row of cells at a time, by `128 * reached + opaque` (a bit for each column).

    Returns:
        128 times the cells reached in the next row, `[16384]`, int64, and eight bytes, `[16384]`, int64: 255 for each
        cell of this row that is seen, else 0.
    """
    bits = torch.arange(128).unsqueeze(1).bitwise_right_shift(torch.arange(VIEW)).bitwise_and(1).bool()
    seen = bits.unsqueeze(1).repeat(1, 128, 1)
    clear = ~bits.unsqueeze(0)
    reached = torch.zeros_like(seen)
    # Light spreads from a clear cell to the next and to the row beyond, first rightwards, then back.
    for columns, aside in ((range(VIEW - 1), 1), (range(VIEW - 1, 0, -1), -1)):
        for i in columns:
            lit = seen[..., i] & clear[..., i]
            seen[..., i + aside] |= lit
            reached[..., i] |= lit
            reached[..., i + aside] |= lit
    following = (reached * 2 ** torch.arange(VIEW)).sum(-1).flatten() * 128
    padded = torch.cat((seen, torch.zeros_like(seen[..., :1])), -1)
    return following, padded.to(torch.uint8).mul(255).view(torch.int64).flatten()


def meanings(env: Any, rule: int) -> dict[Any, int]:
    """What cells `(x, y)`, or objects by identity, mean to the level's task."""
    if rule == FETCH_ONE:
        return {id(env.obj): RIGHT_ONE}
    if rule == FETCH_FIRST:
        wanted = (env.targetType, env.targetColor)
        return {id(each): RIGHT_ONE for each in env.grid.grid if each and (each.type, each.color) == wanted}
    if rule == MATCH:
        return {tuple(map(int, env.success_pos)): RIGHT_ONE, tuple(map(int, env.failure_pos)): WRONG_ONE}
    if rule == FAR:
        x, y = map(int, env.target_pos)
        return dict.fromkeys(((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)), RIGHT_ONE)
    return {}


def encode(env: MiniGridEnv, meaning: dict[Any, int]) -> np.ndarray:
    """Codes of a level's cells, `[height, width]`."""
    codes = []
    for i, each in enumerate(env.grid.grid):
        place = (i % env.width, i // env.width)
        means = meaning.get(place, meaning.get(id(each), PLAIN)) if meaning else PLAIN
        if each is None:
            codes.append(CODE[EMPTY, 0, 0, NO_KEY, means])
            continue
        content = each.contains
        inside = NO_KEY if content is None else COLOR_TO_IDX[content.color]
        if content is not None and content.type != "key":
            raise KeyError(f"a {each.type} with a {content.type}")
        cell = (*each.encode(), inside)
        if each.type not in ("key", "ball", "box"):
            means = PLAIN
        codes.append(CODE[*cell, means])
    return np.array(codes, dtype=np.uint8).reshape(env.height, env.width)
