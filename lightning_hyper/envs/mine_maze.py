"""Mine mazes: a signal at the beginning says which way to turn at the end, many rooms later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_hyper.checks import Count, Range, checked
from lightning_hyper.envs.base import BatchedEnv
from lightning_hyper.envs.mine_maze_panels import CELLS, NAMES, are_published, folder_panels, voxel_panels
from lightning_hyper.envs.rendering import SIZE

LEFT, FORWARD, RIGHT = range(3)
TIMEOUT = 200  # frames; the last of them pays nothing and moves nobody
PROGRESS, CHECK, SUCCESS, FAILURE = 0.1, 0.1, 4.0, -3.0
HIDDEN = len(NAMES)  # the panel of a signal that is not shown, which is black
COLOURS = {"green": "#2E9E4F", "red": "#B02015"}
# Where each action leads within a room: from a cell to the next, to the cell itself, or out.
OUT = (0, 4)
MOVES = {
    (0, 0): ((0, 0), (0, 1), (0, 0)),
    (0, 1): ((-1, 1), (0, 1), (1, 1)),
    (-1, 1): ((-1, 1), (-1, 2), (-1, 1)),
    (1, 1): ((1, 1), (1, 2), (1, 1)),
    (-1, 2): ((-1, 2), (-1, 3), (-1, 2)),
    (1, 2): ((1, 2), (1, 3), (1, 2)),
    (-1, 3): ((-1, 3), (-1, 3), (0, 3)),
    (1, 3): ((0, 3), (1, 3), (1, 3)),
    (0, 3): ((0, 3), OUT, (0, 3)),
}


class Kind(NamedTuple):
    """What tells the mazes apart.

    Attributes:
        rooms: rooms in a row.
        signals: colours of each signal, one shown after the other; the first of them means up.
        noise: deviation of the noise on observations.
        hidden: whether black is shown in place of the signal.
    """

    rooms: int
    signals: tuple[tuple[str, ...], ...] = (("green",), ("red",))
    noise: float = 0.0
    hidden: bool = False


KINDS = {
    "LS": Kind(16),
    "LSO": Kind(10, (("green", "red"), ("red", "green"), ("green", "green"), ("red", "red"))),
    "LSN": Kind(10, noise=0.05),
    "LSH": Kind(16, hidden=True),
}


class MineMaze(BatchedEnv):
    """A batch of mine mazes: a signal, a row of rooms, and at the end a turn that the signal decides.

    Actions: left, forward, right. Right leads from each panel of the signal to the next and into the first room; in a
    room one turns left at an iron pillar and right at a diamond pillar, walks past it and back to the middle. Each
    move pays 0.1, but for the turn at a pillar, which pays 0.1 on the right side and 0 on the other; a blocked move
    pays 0 and changes nothing. At the end right pays 4 where the signal was up and -3 where it was down, left the
    opposite, and the episode terminates; so it does at frame 200, which pays 0 and moves nobody. Pillars are drawn for
    each episode. The signal is the task, 1 for up and -1 for down, and `Trials` keeps it.

    The mazes (optimal frames and return, and the best return without a memory of the signal):

    - `LS`: 16 rooms; green for up, red for down; 98, 13.7; 10.2.
    - `LSO`: 10 rooms; two panels, of which green then red, one of four equally likely pairs, is up; 63, 10.2; 8.45.
    - `LSN`: 10 rooms, LS's signal, Gaussian noise of 0.05 on observations, clipped to [-1, 1]; 62, 10.1; 6.6.
    - `LSH`: LS with black in place of the signal, which the first episode's last reward tells; 98, 13.7 from then on.

    Observations `[size * size * 3]` (or `[size, size, 3]`) are the panel of the view, in [-1, 1), rows from the bottom
    up as published. The default panels are this package's own, blocks of procedural textures in the published
    geometry, and not Minecraft's imagery.

    Args:
        num_envs: episodes stepped side by side.
        kind: which of the mazes.
        rooms: rooms in a row; null for the kind's own.
        size: pixels along a side of a panel; 10 in Beck et al. 2023, 42 in Beck et al. 2020.
        panels: folder of screenshots to show instead: `green.png`, `red.png`, `end.png`, `room{0,1}/x,y.png`.
        flat: show the pixels as a vector rather than an image.
        device: where the tensors live.

    Attributes:
        scenery: what the panels are: `voxel`, our own; `published`, the papers' screenshots; `folder`, others.

    Raises:
        RecipeError: a name or count out of range, or a folder that is incomplete or of another size.

    Source: Beck et al. 2023 (arXiv 2309.14970), MC-LS, and its published code; after Beck et al. 2020 (AMRL, ICLR).
    """

    @checked
    def __init__(
        self,
        num_envs: Count = 16,
        *,
        kind: Literal["LS", "LSO", "LSN", "LSH"] = "LS",
        rooms: Annotated[int, Range(1, 32)] | None = None,
        size: Annotated[int, Range(4, 512)] = 10,
        panels: str | None = None,
        flat: bool = True,
        device: str = "cpu",
    ) -> None:
        super().__init__(num_envs, device)
        self.kind, self.horizon, self.size, self.flat = KINDS[kind], TIMEOUT, size, flat
        self.rooms = self.kind.rooms if rooms is None else rooms
        self._pixels = voxel_panels(size) if panels is None else folder_panels(panels, size)
        self.scenery = "voxel" if panels is None else "published" if are_published(self._pixels) else "folder"
        if self.scenery == "folder":
            rank_zero_info(f"MineMaze: the panels in {panels} are not the published screenshots, pixel by pixel")
        shape = (size * size * 3,) if flat else (size, size, 3)
        shown = (np.flip(self._pixels, 1).astype(np.float32) - 128) / 128
        black = np.full_like(shown[:1], -1)
        self._panels = torch.from_numpy(np.concatenate((shown, black))).reshape(-1, *shape).to(self.device)
        self._tables()
        self._signal = torch.zeros(num_envs, device=self.device, dtype=torch.int64)
        self._place, self._pillars = self._signal, self._signal
        self._make_specs(shape, 3, task_features=1)

    def _tables(self) -> None:
        """What follows each situation (place, kind of the room's pillar, signal) and action.

        Places are the panels of the signal, the cells of all rooms, the end, and left and right of it.
        """
        signals, spread = self.kind.signals, len(self.kind.signals[0])
        rooms = [(room, cell) for room in range(self.rooms) for cell in CELLS]
        end = spread + len(rooms)
        first = {0: spread} | {room: spread + room * len(CELLS) for room in range(self.rooms + 1)}
        following, rewards, panels = [], [], []
        for place in range(end + 3):
            for pillar in (0, 1):
                for which, colours in enumerate(signals):
                    moves, paid = [place] * 3, [0.0] * 3
                    panel = NAMES.index("end")
                    if place < spread:
                        panel = HIDDEN if self.kind.hidden else NAMES.index(colours[place])
                        moves[RIGHT], paid[RIGHT] = place + 1, PROGRESS
                    elif place < end:
                        room, cell = rooms[place - spread]
                        panel = NAMES.index(f"room{pillar}/{cell[0]},{cell[1]}")
                        for action, to in enumerate(MOVES[cell]):
                            if to != cell:
                                moves[action] = first[room + 1] if to == OUT else first[room] + CELLS.index(to)
                                right = action == (RIGHT if pillar else LEFT)
                                paid[action] = CHECK * right if cell == (0, 1) else PROGRESS
                    elif place == end:
                        moves[LEFT], moves[RIGHT] = end + 1, end + 2
                        paid[LEFT], paid[RIGHT] = (FAILURE, SUCCESS) if which == 0 else (SUCCESS, FAILURE)
                    following += moves
                    rewards += paid
                    panels.append(panel)
        where = [(k - spread, 0) for k in range(spread)]
        where += [(x, 4 * room + y) for room, (x, y) in rooms] + [(x, 4 * self.rooms) for x in (0, -1, 1)]
        self._where, self._end = np.array(where), end
        in_room = [0] * spread + [room for room, _ in rooms] + [0] * 3
        self._next, self._panel, self._room = (
            torch.tensor(table, device=self.device) for table in (following, panels, in_room)
        )
        self._rewards = torch.tensor(rewards, device=self.device)

    def _situation(self) -> Tensor:
        pillar = self._pillars.bitwise_right_shift(self._room.index_select(0, self._place)).bitwise_and_(1)
        return torch.add(pillar, self._place, alpha=2).mul_(len(self.kind.signals)).add_(self._signal)

    def draw_tasks(self, rows: Tensor) -> None:
        self._signal = torch.where(rows, self.chosen_tasks(len(self.kind.signals)), self._signal)

    def start(self, rows: Tensor) -> None:
        # A bit for each room, drawn for all, so that what one draws does not depend on how many others begin with it.
        drawn = torch.randint(2**self.rooms, self.batch_size, generator=self.generator, device=self.device)
        self._pillars = torch.where(rows, drawn, self._pillars)
        self._place = self._place.masked_fill(rows, 0)

    def observation(self) -> Tensor:
        shown = self._panels.index_select(0, self._panel.index_select(0, self._situation()))
        if not self.kind.noise:
            return shown
        noise = torch.empty_like(shown).normal_(std=self.kind.noise, generator=self.generator)
        return noise.add_(shown).clamp_(-1, 1)

    def simulate(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        late = cast(dict[str, Tensor], self.current)["step_count"].squeeze(-1) >= TIMEOUT - 1
        key = self._situation().mul_(3).add_(action)
        self._place = torch.where(late, self._place, self._next.index_select(0, key))
        reward = self._rewards.index_select(0, key).masked_fill_(late, 0.0)
        return self.observation(), reward, late | (self._place > self._end)

    def entries(self) -> dict[str, Tensor]:
        return {"task": torch.where(self._signal == 0, 1.0, -1.0).unsqueeze(-1)}

    def render(self) -> NDArray[Any]:
        """The view of the first environment, over a line with its signal, how far it has come, and the right end."""
        situation = int(self._situation()[0])
        panel, place, side = int(self._panel[situation]), int(self._place[0]), SIZE[1]
        pixels = voxel_panels(side // 2) if self.scenery == "voxel" else self._pixels
        picture = Image.new("RGB", (side, side + 20), "white")
        if panel != HIDDEN:
            picture.paste(Image.fromarray(pixels[panel]).resize((side, side), Image.Resampling.NEAREST))
        else:
            picture.paste("black", (0, 0, side, side))
        draw, colours = ImageDraw.Draw(picture), self.kind.signals[int(self._signal[0])]
        for k, colour in enumerate(colours):
            draw.rectangle((12 * k, side + 4, 12 * k + 10, side + 14), fill=COLOURS[colour])
        begin, stop = 12 * len(colours) + 2, side - 22
        along = float(self._where[place, 1]) / (4 * self.rooms)
        draw.rectangle((begin, side + 8, begin + along * (stop - begin), side + 10), fill="#0072B2")
        draw.text((stop + 4, side + 3), "->" if self._signal[0] == 0 else "<-", fill="black")
        return np.asarray(picture)

    def film(self, sights: Sequence[NDArray[Any]], path: Path, seconds: float) -> None:
        # In the colours of all panels, of which the first picture has one alone.
        palette = Image.fromarray(np.concatenate(self._pixels)).quantize(200)
        signs = [0, 114, 178, 46, 158, 79, 176, 32, 21, 255, 255, 255, 0, 0, 0]  # and of the line below
        palette.putpalette((palette.getpalette() or [])[:600] + signs)
        first, *rest = (Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE) for x in sights)
        first.save(path, save_all=True, append_images=rest, duration=round(1000 * seconds), loop=0, optimize=False)

    def places(self) -> NDArray[Any]:
        where: NDArray[Any] = self._where[self._place[:1].cpu().numpy()]
        return where

    def draw_map(self, axes: Any) -> None:
        for k, colour in enumerate(colours := self.kind.signals[int(self._signal[0])]):
            axes.plot(k - len(colours), 0, marker="s", color=COLOURS[colour], markersize=9, zorder=0)
        for room in range(self.rooms):
            axes.plot(0, 4 * room + 2, marker="s", color="#BBBBBB", markersize=4, zorder=0)
        side = 1 if self._signal[0] == 0 else -1
        axes.plot(side, 4 * self.rooms, marker="*", color="#D55E00", markersize=14, zorder=0)
        axes.set(xlim=(-3, 3), ylim=(-2, 4 * self.rooms + 2), xticks=(), yticks=())

    def snapshot(self) -> dict[str, Any]:
        return {"signal": self._signal.clone(), "place": self._place.clone(), "pillars": self._pillars.clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        kept = (state[name].to(self.device, copy=True) for name in ("signal", "place", "pillars"))
        self._signal, self._place, self._pillars = kept
