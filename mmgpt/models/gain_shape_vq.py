"""An image tokenizer for small pictures and machines: a picture is a few masks, each put somewhere in one colour.

Gain-shape vector quantisation (Sabin and Gray, 1984) with a dictionary that may be shifted, coded by matching pursuit
(Mallat and Zhang, 1993): the places that explain most of what they see paint, what they painted is taken away, and the
next best follow. So an object is one colour code, one mask code and the row and column of its centre in its place; its
shape's code depends neither on its colour nor on where it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmgpt.core.config import ConfigError
from mmgpt.core.stream import Batch
from mmgpt.models import VisionConfig
from mmgpt.nn.param import Variable, act, by_row, param, zeros
from mmgpt.nn.quantize import Quantizer, nearest


class Codebooks(NamedTuple):
    """`masks [M, K, K]` in 0..1, `colours [C, 3]` as differences from `background [3]`."""

    masks: jax.Array
    colours: jax.Array
    background: jax.Array


class GainShapeVQ(nnx.Module):
    class Config(VisionConfig):
        """Sizes in pixels: a place is `patch` wide, masks `side` (even), and their centres lie `stride` apart.

        A place paints only if that saves `worth` of squared error (pixels in -1..1, summed), at most once in `rounds`
        rounds. With `stride` equal to `patch` there is one centre, the place's middle, and it has no code. In training,
        masks with less than `idle` of a fair share of the places restart where a picture is explained worst.
        """

        patch: int = 16
        side: int = 18
        stride: int = 1
        masks: int = 32
        colours: int = 12
        worth: float = 6.0
        rounds: int = 3
        idle: float = 0.25

        @property
        def coarse(self) -> int:
            """How far apart the centres lie that a search looks at first."""
            return min(2 * self.stride, self.patch)

        @property
        def centres(self) -> int:
            """How many rows, and as many columns, of centres a place has."""
            return self.patch // self.stride

        @property
        def first(self) -> int:
            """Pixels from a place's corner to its first centre."""
            return self.patch // 2 if self.centres == 1 else 0

        @property
        def overlapping(self) -> bool:
            """Whether two places can paint the same pixel; if not, one round is enough."""
            return self.centres > 1 or self.side > self.patch

        @property
        def plateau(self) -> int:
            """How many of a mask's highest pixels are brought to 1: fewer than the smallest object has."""
            return max(1, self.side**2 // 13)

        @property
        def codebooks(self) -> tuple[int, ...]:
            """Colours, masks, and rows and columns of centres; code 0 of each is "nothing painted here"."""
            place = (self.centres + 1,) * 2 if self.centres > 1 else ()
            return (self.colours + 1, self.masks + 1, *place)

        @property
        def blanks(self) -> bool:
            return True

        def step_flops(self, batch: Batch) -> float:
            """Matmul operations of one training step: the search of every round."""
            B, H, W, _ = batch.streams["pixels"].feats.shape
            blurred = (H // self.coarse) * (W // self.coarse) * self.side**2 // 4
            fine = (H // self.patch) * (W // self.patch) * (2 * self.coarse // self.stride - 1) ** 2 * self.side**2
            return 2.0 * B * self.rounds * 4 * self.masks * (blurred + fine)

        def build(self, rngs: nnx.Rngs) -> "GainShapeVQ":
            if min(self.side, self.stride, self.masks, self.colours, self.rounds) < 1:
                raise ConfigError("model.side, stride, masks, colours and rounds must be at least 1.")
            if self.side % 2 or self.coarse % 2 or self.patch % self.coarse or self.patch % self.stride:
                raise ConfigError(
                    f"model.side {self.side} and model.patch {self.patch} must be even, and the patch equal to "
                    f"model.stride {self.stride} or a multiple of its double."
                )
            return GainShapeVQ(rngs, self)

    def __init__(self, rngs: nnx.Rngs, c: "GainShapeVQ.Config"):
        self.config = c
        self.background = param(rngs, "norm", (3,), zeros, kind=Variable)
        self.colours = Quantizer(rngs, c.colours, 3)
        self.masks = param(rngs, "codes height width", (c.masks, c.side, c.side), zeros, kind=Variable)
        self.energy = param(rngs, "codes", (c.masks,), zeros, kind=Variable)
        self.count = param(rngs, "codes", (c.masks,), zeros, kind=Variable)

    def codebooks(self) -> Codebooks:
        """What painting uses: masks brought to a plateau of 1, with faint traces of neighbours cut off."""
        raw = self.masks[...]
        highest = jax.lax.top_k(raw.reshape(raw.shape[0], -1), self.config.plateau)[0]
        masks = jnp.clip(raw / jnp.maximum(jnp.mean(highest, axis=1), 0.1)[:, None, None], 0.0, 1.0)
        return Codebooks(jnp.where(masks < 0.06, 0.0, masks), self.colours.codebook[...], self.background[...])

    def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Codes `[B, h, w, codebooks] int32` of pixels `[B, H, W, 3]` in -1..1."""

        def codes_of(pixels: jax.Array, books: Codebooks) -> jax.Array:
            return _pursue(pixels - books.background[None, None, None], books, self.config)

        books = jax.lax.stop_gradient(self.codebooks())  # which code is best has no gradient
        return by_row(codes_of, pixels_BHWC, books, "batch height width channels")

    def decode(self, codes_BHWC: jax.Array) -> jax.Array:
        """Pixels `[B, H, W, 3]` in -1..1 of codes `[B, h, w, codebooks]`."""

        def pixels_of(codes: jax.Array, books: Codebooks) -> jax.Array:
            drawn = _overlaid(_painted(codes, books), _centres(codes), self.config)
            return drawn + books.background[None, None, None]

        return by_row(pixels_of, codes_BHWC, self.codebooks(), "batch height width channels")

    def follow(
        self, key: jax.Array, pixels_BHWC: jax.Array, codes_BHWC: jax.Array, weight_B: jax.Array, decay: float
    ) -> dict[str, jax.Array | dict[str, jax.Array]]:
        """The state after a batch: masks and colours move to what their places should have painted.

        Masks that are hardly used restart where a picture is explained worst. Pictures of weight 0 do not count.
        """
        # The codebooks see the whole batch, on every device.
        wanted = act(pixels_BHWC - self.background[...][None, None, None], "codes height width channels")
        codes, weight_B = act(codes_BHWC, "codes height width channels"), act(weight_B, "codes")
        c, books = self.config, jax.lax.stop_gradient(self.codebooks())
        weight_BHW = jnp.broadcast_to(weight_B[:, None, None], codes.shape[:3])
        painted_NKKC = _painted(codes, books)
        left = wanted - _overlaid(painted_NKKC, _centres(codes), c)
        own_NKKC = _cut(left, _centres(codes), c) + painted_NKKC  # what nobody else explains
        colour, mask = (codes[..., i].reshape(-1) - 1 for i in range(2))
        on = weight_BHW.reshape(-1) * (mask >= 0)
        alpha_NKK = books.masks[jnp.maximum(mask, 0)]
        size_N = jnp.sum(jnp.square(alpha_NKK), axis=(1, 2)) + 1e-6
        seen_NC = jnp.einsum("nijc,nij->nc", own_NKKC, alpha_NKK) / size_N[:, None]

        # A mask is the least-squares fit to its windows, given their colours.
        bright_N = on * jnp.sum(jnp.square(seen_NC), axis=1)
        fit_NKK = on[:, None, None] * jnp.einsum("nijc,nc->nij", own_NKKC, seen_NC)
        rows = jnp.where(mask >= 0, mask, c.masks)
        energy = jnp.zeros_like(self.energy[...]).at[rows].add(bright_N, mode="drop")
        fit = jnp.zeros_like(self.masks[...]).at[rows].add(fit_NKK, mode="drop")
        used = jnp.zeros_like(self.count[...]).at[rows].add(on, mode="drop")
        new_energy = decay * self.energy[...] + (1.0 - decay) * energy
        rate = jnp.where(energy > 0, (1.0 - decay) * energy / jnp.maximum(new_energy, 1e-9), 0.0)
        change = fit / jnp.maximum(energy, 1e-9)[:, None, None] - self.masks[...]
        masks = self.masks[...] + rate[:, None, None] * change
        count = decay * self.count[...] + (1.0 - decay) * used

        badness, wrong, (seed_NKK, seed_NC) = _worst(wanted, left, weight_BHW, c)
        idle = jnp.argsort(count)[: badness.size]
        fair = (jnp.sum(on) + wrong) / c.masks
        usual = jnp.where(jnp.sum(weight_B) > 0, _most_frequent(pixels_BHWC, weight_B), self.background[...])
        settled = jnp.max(jnp.abs(usual - self.background[...])) < 0.05  # until then windows hold background
        restart = (count[idle] < c.idle * fair) & (badness > 0) & settled
        seen = jnp.concatenate([seen_NC, seed_NC])
        colour = jnp.concatenate([jnp.maximum(colour, 0), self.colours.encode(seed_NC)])
        colours = self.colours.follow(key, seen, colour, jnp.concatenate([on, restart.astype(on.dtype)]), decay)

        def put(state: jax.Array, fresh: jax.Array) -> jax.Array:
            return state.at[jnp.where(restart, idle, state.shape[0])].set(fresh, mode="drop")

        return {
            "background": 0.5 * (self.background[...] + usual),
            "colours": colours,
            "masks": put(masks, seed_NKK),
            "energy": put(new_energy, (1.0 - decay) * jnp.sum(jnp.square(seed_NC), axis=1)),
            "count": put(count, jnp.full(badness.shape, fair)),
        }


def _most_frequent(pixels_BHWC: jax.Array, weight_B: jax.Array, bins: int = 32) -> jax.Array:
    """The most frequent value of each channel, `[C]`: the mean of the fullest of `bins` bins of -1..1."""
    values = act(pixels_BHWC, "codes height width channels").reshape(-1, pixels_BHWC.shape[-1])
    weight = jnp.broadcast_to(weight_B[:, None, None], pixels_BHWC.shape[:3]).reshape(-1)
    bin_NC = jnp.clip(jnp.floor((values + 1.0) * (bins / 2)), 0, bins - 1).astype(jnp.int32)
    channel = jnp.arange(values.shape[-1])[None]
    filled = jnp.zeros((bins, values.shape[-1])).at[bin_NC, channel].add(weight[:, None])
    inside = (bin_NC == jnp.argmax(filled, axis=0)[None]) * weight[:, None]
    return jnp.sum(values * inside, axis=0) / jnp.maximum(jnp.sum(inside, axis=0), 1e-6)


def _centres(codes_BHWC: jax.Array) -> jax.Array:
    """Row and column of each place's centre in steps of `stride`, `[B, h, w, 2]`."""
    if codes_BHWC.shape[-1] == 2:
        return jnp.zeros_like(codes_BHWC)
    return jnp.maximum(codes_BHWC[..., 2:] - 1, 0)


def _corner(centre_BHW2: jax.Array, c: GainShapeVQ.Config) -> tuple[jax.Array, jax.Array]:
    """First row and column `[B, h * w]` of each place's window in a picture padded by half a side."""
    B, h, w, _ = centre_BHW2.shape
    down, across = (c.patch * jnp.arange(n, dtype=jnp.int32) + c.first for n in (h, w))
    rows = down[None, :, None] + c.stride * centre_BHW2[..., 0]
    columns = across[None, None, :] + c.stride * centre_BHW2[..., 1]
    return rows.reshape(B, -1), columns.reshape(B, -1)


def _pad(x_BHWC: jax.Array, pixels: int) -> jax.Array:
    return jnp.pad(x_BHWC, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))


def _cut(x_BHWC: jax.Array, centre_BHW2: jax.Array, c: GainShapeVQ.Config, wider: int = 0) -> jax.Array:
    """The window of each place, `[B * h * w, K, K, C]`, zeros outside the picture; `wider` pixels more on each side."""
    side = c.side + 2 * wider

    def one(picture: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(picture, (row, column, 0), (side, side, picture.shape[-1]))

    cut = jax.vmap(jax.vmap(one, (None, 0, 0)))(_pad(x_BHWC, c.side // 2 + wider), *_corner(centre_BHW2, c))
    return cut.reshape(-1, *cut.shape[2:])


def _overlaid(windows_NKKC: jax.Array, centre_BHW2: jax.Array, c: GainShapeVQ.Config) -> jax.Array:
    """Pictures `[B, H, W, C]` with all windows added up where they lie."""
    B, h, w, _ = centre_BHW2.shape
    windows = windows_NKKC.reshape(B, h * w, *windows_NKKC.shape[1:])
    inside = jnp.arange(c.side, dtype=jnp.int32)

    def one(windows: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        canvas = jnp.zeros((h * c.patch + c.side, w * c.patch + c.side, windows.shape[-1]), windows.dtype)
        rows, columns = row[:, None] + inside[None], column[:, None] + inside[None]
        return canvas.at[rows[:, :, None], columns[:, None, :]].add(windows)

    half = c.side // 2
    return jax.vmap(one)(windows, *_corner(centre_BHW2, c))[:, half:-half, half:-half]


def _painted(codes_BHWC: jax.Array, books: Codebooks) -> jax.Array:
    """What each place paints in its window, `[B * h * w, K, K, 3]`."""
    on = jnp.all(codes_BHWC > 0, axis=-1).reshape(-1).astype(jnp.float32)
    colour, mask = (jnp.maximum(codes_BHWC[..., i].reshape(-1) - 1, 0) for i in range(2))
    return (books.masks[mask] * on[:, None, None])[..., None] * books.colours[colour][:, None, None, :]


def _pursue(wanted_BHWC: jax.Array, books: Codebooks, c: GainShapeVQ.Config) -> jax.Array:
    """Codes by matching pursuit; in each round all places paint that would save more than their neighbours."""
    B, H, W, _ = wanted_BHWC.shape
    codes = jnp.zeros((B, H // c.patch, W // c.patch, len(c.codebooks)), jnp.int32)
    for _ in range(c.rounds):
        left = wanted_BHWC - _overlaid(_painted(codes, books), _centres(codes), c)
        best, gain = _best(left, books, c)
        gain = jnp.where(codes[..., 1] > 0, 0.0, gain)  # a place paints once
        paints = gain > c.worth
        if c.overlapping:
            paints &= _highest_nearby(gain)
        codes = jnp.where(paints[..., None], best, codes)
    return codes


def _best(left_BHWC: jax.Array, books: Codebooks, c: GainShapeVQ.Config) -> tuple[jax.Array, jax.Array]:
    """The codes `[B, h, w, codebooks]` that fit each place best and the squared error `[B, h, w]` they would save."""
    energetic = jnp.concatenate([left_BHWC, jnp.sum(jnp.square(left_BHWC), axis=-1, keepdims=True)], axis=-1)

    def scores(x_NHWC: jax.Array, masks_MKK: jax.Array, stride: int) -> jax.Array:
        """What each mask explains around each centre; where windows overlap, less what it covers and does not
        explain: one mask over two objects explains both badly."""
        red, green, blue, power = jnp.moveaxis(_correlated(x_NHWC, masks_MKK, stride), 1, 0)
        explained = (jnp.square(red) + jnp.square(green) + jnp.square(blue)) / _size(masks_MKK)[None, None, None]
        return 2.0 * explained - power if c.overlapping else explained

    B, H, W, _ = left_BHWC.shape
    grid = B, H // c.patch, W // c.patch
    centre = jnp.zeros((*grid, 2), jnp.int32)
    if c.centres > 1:
        # First at half the resolution, which takes a quarter of the operations, and at every other centre.
        blurred = _halved(_pad(energetic, c.side // 2))
        coarse = jnp.max(scores(blurred, _halved(books.masks[..., None])[..., 0], c.coarse // 2), axis=-1)
        _, centre = _highest_in_place(coarse, c)

    # Then every mask at the centres between: a few small windows, and not the whole picture.
    step, wider = c.coarse // c.stride, c.coarse - c.stride
    fine = scores(_cut(energetic, centre, c, wider), books.masks, c.stride)
    shifts = jnp.arange(1 - step, step, dtype=jnp.int32)
    at = centre.reshape(-1, 1, 2) + shifts[None, :, None]
    inside = (at >= 0) & (at < c.patch // c.stride)
    fine = jnp.where((inside[:, :, None, 0] & inside[:, None, :, 1])[..., None], fine, -jnp.inf)
    best = jnp.argmax(fine.reshape(fine.shape[0], -1), axis=1)
    row, column, mask = jnp.unravel_index(best, fine.shape[1:])
    centre = centre + jnp.stack([shifts[row], shifts[column]], axis=-1).reshape(centre.shape)

    size = _size(books.masks)[mask][:, None]
    projected = jnp.einsum("nijc,nij->nc", _cut(left_BHWC, centre, c), books.masks[mask])
    colour = nearest(books.colours, projected / size)
    value = books.colours[colour]
    gain = jnp.sum(2.0 * value * projected - jnp.square(value) * size, axis=1)
    codes = [colour.reshape(grid), mask.reshape(grid).astype(jnp.int32)]
    codes += [centre[..., 0], centre[..., 1]] if len(c.codebooks) > 2 else []
    return jnp.stack(codes, axis=-1) + 1, gain.reshape(grid)


def _size(masks_MKK: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(masks_MKK), axis=(1, 2)) + 1e-6


def _halved(x_NHWC: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels."""
    N, H, W, C = x_NHWC.shape
    return jnp.mean(x_NHWC.reshape(N, H // 2, 2, W // 2, 2, C), axis=(2, 4))


def _correlated(padded_BHWC: jax.Array, masks_MKK: jax.Array, stride: int) -> jax.Array:
    """Sums over windows of mask times channel, `[B, C, rows, columns, M]`."""
    B, H, W, C = padded_BHWC.shape
    sums = jax.lax.conv_general_dilated(
        jnp.moveaxis(padded_BHWC, -1, 1).reshape(B * C, H, W, 1),
        jnp.moveaxis(masks_MKK, 0, -1)[:, :, None, :],
        window_strides=(stride, stride),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return sums.reshape(B, C, *sums.shape[1:])


def _highest_in_place(value_BHW: jax.Array, c: GainShapeVQ.Config) -> tuple[jax.Array, jax.Array]:
    """`(value [B, h, w], centre [B, h, w, 2])` of the best of the values at all coarse centres."""
    n = c.patch // c.coarse
    B, H, W = value_BHW.shape
    H, W = (H - 1) // n, (W - 1) // n  # a last row and column of centres belongs to no place
    places = value_BHW[:, : H * n, : W * n].reshape(B, H, n, W, n).transpose(0, 1, 3, 2, 4).reshape(B, H, W, n * n)
    best = jnp.argmax(places, axis=-1).astype(jnp.int32)
    centre = jnp.stack(jnp.divmod(best, n), axis=-1) * (c.coarse // c.stride)
    return jnp.max(places, axis=-1), centre


def _bell(side: int) -> jax.Array:
    """A weight that falls off from a window's centre, so that the window that centres an object holds most of it."""
    off = (jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2) / (side / 4)
    return jnp.exp(-0.5 * (off[:, None] ** 2 + off[None] ** 2))


def _middle(x_BHWC: jax.Array, c: GainShapeVQ.Config) -> tuple[jax.Array, jax.Array]:
    """`(held [B, h, w], centre [B, h, w, 2])`: the most that a window of each place holds in its middle, and where."""
    power = jnp.sum(jnp.square(x_BHWC), axis=-1, keepdims=True)
    if c.centres == 1:
        B, H, W, _ = x_BHWC.shape
        centre = jnp.zeros((B, H // c.patch, W // c.patch, 2), jnp.int32)
        return jnp.einsum("nijc,ij->n", _cut(power, centre, c), _bell(c.side)).reshape(centre.shape[:3]), centre
    held = _correlated(_pad(power, c.side // 2), _bell(c.side)[None], c.coarse)[:, 0, :, :, 0]
    return _highest_in_place(held, c)


def _highest_nearby(value_BHW: jax.Array) -> jax.Array:
    """Whether a place's value is the highest among its neighbours'; of equals the first in reading order."""
    _, h, w = value_BHW.shape
    order = jnp.broadcast_to(-jnp.arange(h * w, dtype=jnp.int32).reshape(1, h, w), value_BHW.shape)

    def highest(x: jax.Array, least: float | int) -> jax.Array:
        return jax.lax.reduce_window(x, least, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")

    top = value_BHW >= highest(value_BHW, -jnp.inf)
    first = jnp.where(top, order, -h * w)
    return top & (first >= highest(first, -h * w))


def _worst(
    wanted_BHWC: jax.Array, left_BHWC: jax.Array, weight_BHW: jax.Array, c: GainShapeVQ.Config
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Windows that masks restart from: a few of those that have something in their middle, with most unexplained.

    Returns what they lose `[N]` (0 where there are fewer), how many windows lose too much, and their seeds.
    """
    held, centre = _middle(wanted_BHWC, c)
    left_power = jnp.square(_cut(left_BHWC, centre, c)) * _bell(c.side)[None, :, :, None]
    lost = weight_BHW * jnp.sum(left_power, axis=(1, 2, 3)).reshape(held.shape)
    wrong = lost > 0.5 * c.worth
    if c.overlapping:
        wrong &= _highest_nearby(held)
    badness, worst = jax.lax.top_k(jnp.where(wrong, lost, 0.0).reshape(-1), min(8, c.masks, lost.size))
    return badness, jnp.sum(wrong), _seed(_cut(wanted_BHWC, centre, c)[worst], c)


def _seed(window_NKKC: jax.Array, c: GainShapeVQ.Config) -> tuple[jax.Array, jax.Array]:
    """A first mask `[N, K, K]` from a window, where it has the colour of its strongest pixels, and that colour."""
    flat = window_NKKC.reshape(window_NKKC.shape[0], -1, window_NKKC.shape[-1])
    power = jnp.sum(jnp.square(flat), axis=2) * _bell(c.side).reshape(1, -1)
    _, strongest = jax.lax.top_k(power, c.plateau)
    colour = jnp.mean(jnp.take_along_axis(flat, strongest[:, :, None], axis=1), axis=1)
    square = jnp.sum(jnp.square(colour), axis=1)[:, None] + 1e-6
    alpha = jnp.clip(jnp.einsum("npc,nc->np", flat, colour) / square, 0.0, 1.0)
    off = jnp.sum(jnp.square(flat - alpha[:, :, None] * colour[:, None, :]), axis=2)
    mask = jnp.where((alpha < 0.1) | (off > 0.1 * square), 0.0, alpha)
    return mask.reshape(window_NKKC.shape[:3]), colour
