"""What kernels/cuda/sparse_tc.cuh and the device's copies do, in numpy: a decoder of packed filters, and the kernel.

Both follow the documents of the hardware (PTX ISA: swizzles, metadata of sparse wgmma, im2col and tiled copies) and the
kernel's source, and share no code with what they test.
"""

from __future__ import annotations

import numpy as np

from escort.methods.cuda.sparse_tc.orders import OrderedFilter
from escort.methods.cuda.sparse_tc.packing import Packed
from escort.methods.cuda.sparse_tc.params import Params
from escort.methods.cuda.sparse_tc.tiling import Tiling, im2col_corners

#: Numpy has no bfloat16: its bits are the upper half of a float32. TF32 is one without its last 13 bits.
DECODED = {
    "fp16": lambda bits: bits.view(np.float16).astype(np.float64),
    "bf16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64),
    "tf32": lambda bits: (bits.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64),
}
#: Input channels of a block: 128 bytes of a pixel.
BLOCK = {"fp16": 64, "bf16": 64, "tf32": 32}
#: In TF32 what tells that the first or the second of two values is kept.
FIRST, SECOND = 0b0100, 0b1110


def decode_tiles(weight_tiles: np.ndarray, precision: str) -> np.ndarray:
    """(tiles, rows, channels of a block): what sparse tensor cores see in weight tiles (tiles, bytes)."""
    blocks, channels = weight_tiles.shape[1] // (4096 + 512), BLOCK[precision]
    decoded = np.zeros((len(weight_tiles), blocks, 64, channels))
    row, half = np.meshgrid(np.arange(64), np.arange(32), indexing="ij")
    address = row * 64 + half * 2
    address ^= (address >> 7 & 3) << 4  # 64-byte swizzle: bits 4 and 5 are xored with bits 7 and 8
    row, group = np.meshgrid(np.arange(64), np.arange(16), indexing="ij")
    selector, within = np.divmod(group, 8)
    thread = row // 16 * 32 + row % 8 * 4 + selector * 2 + within // 4
    shift = np.where(row % 16 >= 8, 16, 0) + within % 4 * 4
    for weight_tile, of in zip(weight_tiles, decoded, strict=True):
        for block in range(blocks):
            values = DECODED[precision](weight_tile[block * 4096 :][:4096].view(np.uint16)[address // 2])
            words = weight_tile[blocks * 4096 + block * 512 :][:512].view(np.uint32)
            nibbles = (words[thread] >> shift & 15).astype(np.int64)
            if precision == "tf32":
                assert np.isin(nibbles, (FIRST, SECOND)).all(), "no other means anything"
                of[block][row, group * 2 + (nibbles == SECOND)] = values
                continue
            assert (nibbles & 3 < nibbles >> 2).all(), "positions ascend"
            for kept, position in enumerate((nibbles & 3, nibbles >> 2)):
                of[block][row, group * 4 + position] = values[:, kept::2]
    return decoded.reshape(len(weight_tiles), blocks * 64, channels)


def decode(packed: Packed, ordered: OrderedFilter, tiling: Tiling) -> np.ndarray:
    """The (K, C, R, S) filter that a list of weight tiles amounts to."""
    p, config = tiling.problem, tiling.config
    depth = BLOCK[p.precision] // 2  # of a product
    seen = decode_tiles(packed.weight_tiles, p.precision).reshape(len(packed.weight_tiles), config.across, -1, 2, depth)
    weight = np.zeros((p.out_channels, len(ordered.in_order), *p.kernel_size))
    rows = packed.out_order.reshape(tiling.channel_tiles, config.across, -1)
    at = 0
    for tile in range(tiling.channel_tiles):
        for number, tap_group in enumerate(tiling.tap_groups):
            assert packed.first[tile * len(tiling.tap_groups) + number] == at
            last = False
            while not last:
                word = int(packed.steps[at])
                (tap,) = (tap for tap in tap_group if tap.start * 8 == word & 0xFFFF)
                for across, half in np.ndindex(config.across, 2):
                    values = seen[at, across, :, half]
                    if not word >> (16 + 2 * across + half) & 1:
                        assert not values.any(), "left out, and not empty"
                        continue
                    inside = rows[tile, across] >= 0
                    assert not values[~inside].any()
                    place = slice((tap.k_block * 2 + half) * depth, (tap.k_block * 2 + half + 1) * depth)
                    weight[rows[tile, across][inside], place, tap.row, tap.column] += values[inside]
                last, at = bool(word >> 31), at + 1
    assert at == len(packed.weight_tiles) == packed.first[-1]
    used = ordered.in_order >= 0
    assert not weight[:, ~used].any()
    restored = np.zeros(p.weight_shape)
    restored[:, ordered.in_order[used]] = weight[:, used]
    return restored


def laid_out(x: np.ndarray, ordered: OrderedFilter, tiling: Tiling) -> np.ndarray:
    """x (N, C, H, W) as (N, H, W, C) with the channels in their places."""
    nhwc = np.zeros((*x.shape[:1], *x.shape[2:], tiling.channels))
    used = np.flatnonzero(ordered.in_order >= 0)
    nhwc[..., used] = x[:, ordered.in_order[used]].transpose(0, 2, 3, 1)
    return nhwc


def emulate(tiling: Tiling, packed: Packed, nhwc: np.ndarray) -> np.ndarray:
    """y (N, K, out_height, out_width) of the whole kernel, without epilogue, for x (N, H, W, C) in places.

    Shared memory begins as NaN, so that what is read from beyond what was loaded, and is not cut off, shows.
    """
    p, config, d = tiling.problem, tiling.config, Params.of(tiling)
    along, m_tile, depth = 1 if config.by_turns else 2 // config.across, config.tile_channels, BLOCK[p.precision] // 2
    samples = len(nhwc)
    whole_rows = config.tap_group in ("columns", "halo")
    read = nhwc if whole_rows or config.tap_group == "im2col" else nhwc.reshape(1, 1, -1, tiling.channels)
    filters = decode_tiles(packed.weight_tiles, p.precision)
    y = np.full((samples, p.out_channels, p.out_height, p.out_width), np.nan)
    written = (
        y.transpose(0, 2, 3, 1) if whole_rows else np.full((1, 1, y.size // p.out_channels, p.out_channels), np.nan)
    )
    stage_pixels = d.b_stage_bytes // 128
    shared = np.full(((tiling.memory.bytes - tiling.memory.b_begin) // 128, 2 * depth), np.nan)
    for stage in range(tiling.memory.b_stages):
        shared[stage * stage_pixels + d.load_pixels :][: d.zero_pixels] = 0.0
    copied = 0
    for item in range(d.m_tiles * tiling.tile_groups(samples)):
        for rank in range(config.cluster):
            m, tile = item % d.m_tiles, item // d.m_tiles * config.cluster + rank
            first_row, first_sample = (
                tile % d.tiles_per_sample * d.tile_rows,
                tile // d.tiles_per_sample * d.tile_samples,
            )
            sums = np.full((m_tile, config.tile_pixels), np.nan)
            accumulate, c, r, s = False, 0, 0, 0
            at = packed.first[m * d.tap_groups]
            for tap_group in range(d.tap_groups):
                to, copied = copied % tiling.memory.b_stages * stage_pixels, copied + 1
                if config.tap_group == "im2col":
                    for part in range(along):
                        row, column = divmod(tile * config.tile_pixels + part * config.pixels, d.out_width)
                        corner = column * d.stride_right - d.left, row % d.out_height * d.stride_down - d.top
                        offset = s * d.dilation_right, r * d.dilation_down
                        shared[to + part * config.pixels :][: config.pixels] = load_im2col(
                            tiling, read, c, corner, row // d.out_height, offset
                        )
                    s += 1
                    if s == p.kernel_size[1]:
                        s, r = 0, r + 1
                    if r == p.kernel_size[0]:
                        r, c = 0, c + 2 * depth
                else:
                    if config.tap_group == "flat":
                        box = load_box(read, tiling.load, c, tile * config.tile_pixels, 0, 0)
                    else:
                        column = s * d.dilation_right - d.left
                        box = load_box(read, tiling.load, c, column, first_row - d.top, first_sample)
                    assert len(box) == d.load_pixels
                    shared[to:][: len(box)] = box
                    s += config.tap_group == "columns"
                    if config.tap_group != "columns" or s == p.kernel_size[1]:
                        s, c = 0, c + 2 * depth
                produced, more = packed.first[m * d.tap_groups + tap_group + 1], True
                while more:
                    word = int(packed.steps[at])
                    start = to + (word & 0xFFFF) // 8
                    pixels = shared[start : start + config.tile_pixels]
                    assert len(pixels) == config.tile_pixels, "read from beyond shared memory"
                    for across in range(config.across):
                        rows = slice(across * m_tile // config.across, (across + 1) * m_tile // config.across)
                        halves = word >> (16 + 2 * across) & 3
                        if not accumulate:
                            assert halves == 3
                            sums[rows] = 0.0
                        for half in (0, 1):
                            k = slice(half * depth, (half + 1) * depth)
                            if halves >> half & 1:
                                sums[rows] += filters[at, rows, k] @ pixels[:, k].T
                    more, accumulate, at = word >> 31 == 0, True, at + 1
                assert at == produced, "the producer counts as many"
            for block in range(m_tile // 64):
                of = sums[block * 64 :][:64]
                out_order = packed.out_order[m * m_tile + block * 64 :][:64]
                if p.precision == "tf32":
                    store_floats(d, tiling, y, tile, of, out_order)
                elif config.takes_channels_last:
                    place = (0, first_row, first_sample) if whole_rows else (tile * config.tile_pixels, 0, 0)
                    boxes = config.split * (along if config.tap_group == "im2col" else 1)
                    for part in range(boxes):
                        begin = part * config.tile_pixels // boxes
                        columns, rows = (0, begin // d.pitch) if whole_rows else (begin, 0)
                        at_box = place[0] + columns, place[1] + rows, place[2]
                        store_box(written, tiling.store, m * m_tile + block * 64, at_box, of.T[begin:])
                else:
                    store_rows(d, tiling, y, tile, of, out_order, first_row, first_sample)
    if tiling.stores_boxes and not whole_rows:
        y[:] = written.reshape(samples, p.out_height, p.out_width, -1).transpose(0, 3, 1, 2)
    return y


def load_im2col(
    tiling: Tiling, x: np.ndarray, c: int, corner: tuple[int, int], n: int, offset: tuple[int, int]
) -> np.ndarray:
    """Pixels from (column, row) of sample n on in the bounding box, shifted by the tap."""
    lower, upper = im2col_corners(tiling.problem)
    samples, height, width, _ = x.shape
    (column, row), pixels = corner, []
    for _ in range(tiling.config.pixels):
        h, w = row + offset[1], column + offset[0]
        inside = n < samples and 0 <= h < height and 0 <= w < width
        pixels.append(channels_of(x[n, h, w], c, tiling.load[0]) if inside else np.zeros(tiling.load[0]))
        column += tiling.problem.stride[1]
        if column >= width + upper[0]:
            column, row = lower[0], row + tiling.problem.stride[0]
            if row >= height + upper[1]:
                row, n = lower[1], n + 1
    return np.array(pixels)


def channels_of(pixel: np.ndarray, c: int, count: int) -> np.ndarray:
    """So many channels from c on, with zeros beyond the last."""
    return np.pad(pixel[c : c + count], (0, count - len(pixel[c : c + count])))


def load_box(x: np.ndarray, box: tuple[int, ...], c: int, w: int, h: int, n: int) -> np.ndarray:
    """A box of x (N, H, W, C), row by row, with zeros outside."""
    channels, width, height, samples = box
    out = np.zeros((samples, height, width, channels))
    for i, j, k in np.ndindex(samples, height, width):
        if n + i < x.shape[0] and 0 <= h + j < x.shape[1] and 0 <= w + k < x.shape[2]:
            out[i, j, k] = channels_of(x[n + i, h + j, w + k], c, channels)
    return out.reshape(-1, channels)


def store_box(y: np.ndarray, box: tuple[int, ...], c: int, place: tuple[int, int, int], staged: np.ndarray) -> None:
    """Writes a box where it lies inside y (N, H, W, K), once."""
    (w, h, n), (_, width, height, samples) = place, box
    for number, (i, j, k) in enumerate(np.ndindex(samples, height, width)):
        if n + i < y.shape[0] and h + j < y.shape[1] and w + k < y.shape[2] and c < y.shape[3]:
            at = y[n + i, h + j, w + k, c : c + 64]
            assert np.isnan(at).all(), "stored twice"
            at[:] = staged[number, : len(at)]


def store_rows(
    d: Params,
    tiling: Tiling,
    y: np.ndarray,
    tile: int,
    sums: np.ndarray,
    out_order: np.ndarray,
    first_row: int,
    first_sample: int,
) -> None:
    """The kernel's stores of 64 rows to y in NCHW, VECTOR neighbouring elements at a time."""
    flat, samples, plane = y.reshape(-1), len(y), d.out_height * d.out_width
    assert d.staging_pitch * 64 <= d.staging_bytes and d.staging_pitch // 16 % 2 == 1
    assert sums.shape[1] * 2 <= d.staging_pitch
    rows = min(d.tile_rows, d.out_height - first_row)
    if tiling.config.tap_group in ("columns", "halo"):
        count = rows * d.out_width * min(d.tile_samples, samples - first_sample)
    else:
        count = min(sums.shape[1], samples * plane - tile * sums.shape[1])
    for unit in range(0, max(count, 0), tiling.vector):
        if tiling.config.tap_group in ("columns", "halo"):
            sample_in_tile, rest = divmod(unit, rows * d.out_width)
            row, column = divmod(rest, d.out_width)
            sample, pixel = first_sample + sample_in_tile, first_row * d.out_width + rest
            staged = sample_in_tile * d.sample_pitch + row * d.pitch + column
            assert column + tiling.vector <= d.out_width
        else:
            sample, pixel = divmod(tile * sums.shape[1] + unit, plane)
            staged = unit
            assert pixel + tiling.vector <= plane
        assert tiling.unaligned or staged % tiling.vector == 0
        for row, channel in enumerate(out_order):
            if channel >= 0:
                to = sample * d.out_channels * plane + pixel + channel * plane
                assert to % tiling.vector == 0 and np.isnan(flat[to : to + tiling.vector]).all(), (
                    "unaligned, or stored twice"
                )
                flat[to : to + tiling.vector] = sums[row, staged : staged + tiling.vector]


def store_floats(d: Params, tiling: Tiling, y: np.ndarray, tile: int, sums: np.ndarray, out_order: np.ndarray) -> None:
    """The kernel's stores of 64 rows of floats to y: each pixel of a tile that is an output."""
    pixel = np.arange(sums.shape[1])
    if tiling.config.tap_group in ("columns", "halo"):
        sample_in_tile, rest = np.divmod(pixel, d.sample_pitch)
        row_in_sample, column = np.divmod(rest, d.pitch)
        sample = tile // d.tiles_per_sample * d.tile_samples + sample_in_tile
        row = tile % d.tiles_per_sample * d.tile_rows + row_in_sample
        inside = (
            (sample_in_tile < d.tile_samples)
            & (row_in_sample < d.tile_rows)
            & (row < d.out_height)
            & (column < d.out_width)
        )
    else:
        sample, rest = np.divmod(tile * sums.shape[1] + pixel, d.out_height * d.out_width)
        row, column = np.divmod(rest, d.out_width)
        inside = pixel >= 0
    inside &= sample < len(y)
    used = out_order >= 0
    at = sample[inside], out_order[used, None], row[inside], column[inside]
    assert np.isnan(y[at]).all(), "stored twice"
    y[at] = sums[used][:, inside]
