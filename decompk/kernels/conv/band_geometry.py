"""The band form without tensors: what a Config means for a Problem, whether it is legal, what it costs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd, prod

from ..problem import Config, Problem, cdiv, power_of_two

SECTOR = 32  # bytes: what L2 hands out
PROGRAMS = 528  # four for each of an H100's processors: enough to hide latencies behind one another
ACCUMULATORS = 64  # registers of sums a thread
SHARED = 100_000  # bytes, so that an H100's processor holds two programs
CANDIDATES = 6
VECTORS = 2e12  # a second, that an H100's load units take with the arithmetic of their addresses
POINTERS = 1.25  # how much better a tile has to look that the copy engine does not read, or write
LAUNCH = 3e-6  # seconds: bands that would take longer to gather are expanded by a launch of their own


@dataclass(frozen=True)
class Side:
    """The images that a kernel reads or writes: rows of width · channels values."""

    height: int
    width: int
    channels: int

    @property
    def values(self) -> int:
        return self.width * self.channels


@dataclass(frozen=True)
class Bands:
    """A Problem under a Config. Group: `stack` rows of written pixels side by side in one row of the matrix product."""

    problem: Problem  # as run: the pixels of a 1×1 kernel may have been cut into other rows
    read: Side
    written: Side
    columns: int  # written pixels of one segment
    block_read: int  # values of a read segment, a power of two
    run: int  # values of a written segment, padded to a power of two
    stack: int
    images: int  # of one tile
    groups: int  # of one tile, along the height
    period: int  # read rows from one group to the next
    rows: range  # the read rows of group 0, all that its taps meet and perhaps some they do not
    first: int  # the first read pixel of segment 0
    advance: int  # read pixels from one segment to the next
    tiles: tuple[int, int, int]  # along images, groups, segments
    vector: int  # values of a whole vector, at which the loads of a segment start: 16 bytes, as descriptors must
    vector_written: int
    load: bool  # by descriptor
    store: bool  # by descriptor; in wgrad dy is read by one
    expand: bool  # the bands are laid out in memory first
    split: bool  # the descriptor's rows are cut into segments, so that the store clips to `columns`

    @property
    def product_rows(self) -> int:
        return self.images * self.groups

    @property
    def member_tiles(self) -> int:
        return self.tiles[0] * self.tiles[1] * self.tiles[2]

    @property
    def folded(self) -> bool:
        """Whether the columns of a tile are so many whole runs of channels that they add up to one of each."""
        channels = self.written.channels
        return self.run == self.columns * channels and channels & (channels - 1) == 0


@functools.lru_cache(maxsize=1024)
def bands(problem: Problem, config: Config, pitch: int = 0, load: bool = True, store: bool = True) -> Bands:
    """The Bands of a legal (problem, config).

    `pitch`: what the distances between rows of an image that crops are read from are multiples of, 0 if not known.
    `load`, `store`: whether descriptors may read, and write, these tensors.
    """
    if _recut(problem, config):
        height = problem.N * problem.H * problem.W // config.tile[2]
        problem = replace(problem, N=1, H=height, W=config.tile[2])
    backward, weights = problem.kind == "dgrad", problem.kind == "wgrad"
    x, y = Side(problem.H, problem.W, problem.C), Side(*problem.out_size, problem.O)
    read, written = (y, x) if backward else (x, y)
    block_read, block_written = (config.block_out, config.block_in) if backward else (config.block_in, config.block_out)
    images, height, columns = config.tile
    run = power_of_two(columns * written.channels, 16 if weights else 1)
    stack = max(1, block_written // run)
    segments = cdiv(written.width, columns)
    rows, pixels = (_met(problem, axis, count) for axis, count in enumerate((stack, columns)))
    period, advance = (
        max(1, size // s) if backward else size * s for size, s in zip((stack, columns), problem.stride, strict=True)
    )
    advance = advance if segments > 1 else 0
    size, crops = problem.element_size, problem.layout == "crops"

    def fits(vector: int) -> bool:
        """Whether segments that start at whole vectors hold all values; wgrad has one band for all segments."""
        starts = {
            (segment * advance + pixels.start) * read.channels % vector for segment in range(min(segments, vector))
        }
        lead = vector - gcd(vector, read.channels) if crops else max(starts)
        return lead + len(pixels) * read.channels <= block_read and not (weights and advance * read.channels % vector)

    pitch = pitch if crops else read.values
    vector = 16 // size
    load = load and pitch % vector == 0 and read.height % (1 if crops else period) == 0 and fits(vector)
    while not load and (pitch % vector or not fits(vector)) and vector > 1:
        vector //= 2
    whole = columns * written.channels * size % 16 == 0
    clipped = segments == 1 or (whole if weights else columns * written.channels == run)
    split = whole and not clipped and written.width % columns == 0
    found = Bands(
        problem=problem,
        read=read,
        written=written,
        columns=columns,
        block_read=block_read,
        run=run,
        stack=stack,
        images=images,
        groups=height // stack,
        period=period,
        rows=rows,
        first=pixels.start,
        advance=advance,
        tiles=(cdiv(problem.N, images), cdiv(written.height, height), segments),
        vector=vector,
        vector_written=gcd(16 // size, written.values, columns * written.channels if segments > 1 else 0),
        load=load,
        store=store and written.values * size % 16 == 0 and run * size >= 16 and (clipped or split),
        expand=False,
        split=split and not weights,
    )
    return replace(found, expand=not weights and _gathers(found) > LAUNCH * VECTORS)


def why_not(problem: Problem, config: Config) -> str | None:
    """Why the band form cannot run `problem` with `config`; None if it can."""
    backward = problem.kind == "dgrad"
    blocks = config.block_in, config.block_out
    if config.form != "band":
        return f"this is a config of the {config.form} form"
    if problem.layout not in ("member", "crops"):
        return f"rows of {problem.layout} activations are not one run of pixels × channels"
    if problem.layout == "crops" and backward:
        return "overlapping crops would write the same pixels"
    if any(not 16 <= block <= 256 or block & (block - 1) for block in blocks):
        return "row segments are powers of two from 16 to 256 values"
    if any(not 1 <= size <= 256 or size & (size - 1) for size in config.tile[:2]) or config.tile[2] < 1:
        return "a tile has powers of two up to 256 images and rows, and a column at least"
    if min(problem.N, problem.C, problem.O, *problem.out_size) < 1:
        return "there is nothing to compute"
    p = bands(problem, config)
    written = config.block_in if backward else config.block_out
    if p.run > written:
        return f"{p.columns} pixels of {p.written.channels} channels do not fit a segment of {written} values"
    if p.groups == 0 or not 16 <= p.product_rows <= 1024:
        return "a matrix product takes 16 to 1024 rows: images × rows of the tile, by the rows that a block holds"
    if len(_met(problem, 1, p.columns)) * p.read.channels > p.block_read:
        return f"a segment of {p.block_read} values does not cover the taps of {p.columns} pixels"
    if problem.kind == "wgrad":
        if p.stack > 1:
            return "wgrad takes one row a segment: block_out is the columns × channels, padded to a power of two"
        if not 1 <= config.splits <= p.member_tiles:
            return f"{p.member_tiles} steps cannot be shared by {config.splits} programs"
    elif config.splits != 1 or config.atomic:
        return "only wgrad shares its pixels among programs"
    if backward and p.stack % problem.stride[0]:
        return f"block_in must hold a multiple of {problem.stride[0]} rows, a row of dy's"
    if backward and p.columns % problem.stride[1] and p.tiles[2] > 1:
        return f"segments of {p.columns} pixels do not start at a pixel of dy's"
    if (
        problem.K * p.member_tiles * config.splits >= 2**31
        or max(p.problem.H, p.read.values, p.written.values) >= 2**30
    ):
        return "more programs, rows or values a row than 32 bits count"
    return None


def row_groups(p: Bands, config: Config) -> tuple[int, int]:
    """(kernel rows of one wgrad program, programs that share the kernel's rows): as many as the registers hold."""
    rows = len(p.rows)
    fit = max(1, ACCUMULATORS * 32 * config.warps // (p.block_read * p.run))
    programs = cdiv(rows, fit)
    return cdiv(rows, programs), programs


def programs(problem: Problem, config: Config) -> int:
    """Of the launch that multiplies matrices."""
    p = bands(problem, config)
    return problem.K * (config.splits * row_groups(p, config)[1] if problem.kind == "wgrad" else p.member_tiles)


def thread_values(problem: Problem, config: Config) -> int:
    """Values that a thread adds up or loads in one step."""
    p = bands(problem, config)
    return (_sums(p, config) + _stage_bytes(p, config) // problem.element_size) // (32 * config.warps)


def thread_sums(problem: Problem, config: Config) -> int:
    """Values that a thread adds up."""
    return _sums(bands(problem, config), config) // (32 * config.warps)


def _sums(p: Bands, config: Config) -> int:
    """Values that a program adds up."""
    if p.problem.kind == "wgrad":
        return row_groups(p, config)[0] * p.block_read * p.run
    return p.product_rows * p.run * p.stack


def stage_bytes(problem: Problem, config: Config) -> int:
    """What a program loads in one step of its loop, weights included."""
    return _stage_bytes(bands(problem, config), config)


def _stage_bytes(p: Bands, config: Config) -> int:
    """What one turn of the loop over kernel rows, in wgrad over steps, keeps in shared memory."""
    if p.problem.kind == "wgrad":
        values = p.product_rows * (row_groups(p, config)[0] * p.block_read + p.run)
    else:
        values = (p.product_rows + p.run * p.stack) * p.block_read
    return values * p.problem.element_size


def shared_bytes(problem: Problem, config: Config) -> int:
    """An upper bound: the stages of the pipeline, or behind them the staged result."""
    p = bands(problem, config)
    staged = 0 if problem.kind == "wgrad" else p.product_rows * p.run * p.stack * 4
    return max(config.stages * _stage_bytes(p, config), staged) + 2048


def executed_flops(problem: Problem, config: Config) -> int:
    """FLOPs of the matrix products as issued: the zeros of the band and the padding of tiles included."""
    p = bands(problem, config)
    rows = prod(row_groups(p, config)) if problem.kind == "wgrad" else len(p.rows)
    return 2 * problem.K * p.member_tiles * rows * p.product_rows * p.block_read * p.run * p.stack


def l2_bytes(problem: Problem, config: Config) -> int:
    """Bytes that the programs load: x and dy in sectors of L2, the bands as gathered or expanded.

    Gathers of less than 16 bytes go through L1, which keeps the weights: they count once a program.
    """
    p = bands(problem, config)
    size = problem.element_size
    lines = p.problem.N * cdiv(p.written.height, p.stack)
    reads = len(p.rows) * lines * _sectors(p, size)
    if problem.kind == "wgrad":
        shares = row_groups(p, config)[1]
        return problem.K * (reads + shares * lines * cdiv(p.written.values * size, SECTOR) * SECTOR)
    weights = problem.taps * problem.C * problem.O
    if p.expand:
        weights = len(p.rows) * p.block_read * p.run * p.stack
    elif problem.C * size % 16 == 0:
        weights *= p.stack * p.columns
    return problem.K * (reads + p.member_tiles * weights * size)


def configs(problem: Problem) -> list[Config]:
    """Legal candidates, the best guess first: by a model of L2, tensor cores and the gathers of the band."""
    for rows in ((64, 128, 256), (32,), (16,)):  # few rows only where shared memory holds no more
        best: dict[tuple[int, int, int], tuple[float, Config]] = {}
        for config in _candidates(problem, rows):
            if why_not(problem, config) is None:
                config = _resources(problem, config)
                p = bands(problem, config)
                if config.stages < 2 or not _fits_registers(p, config):
                    continue
                # Of the tiles that give matrices of the same width, one is enough.
                key = p.block_read, p.run, p.stack
                found = _cost(problem, config), config
                best[key] = min(found, best.get(key, found), key=lambda item: item[0])
        if best:
            break
    ranked = [config for _, config in sorted(best.values(), key=lambda item: item[0])]
    with_eight = [(config, _resources(problem, config, 8)) for config in ranked]  # what an A100 takes
    few = list(dict.fromkeys(itertools.chain(*with_eight)))[:CANDIDATES]
    if problem.kind == "wgrad" and not problem.deterministic:
        few = [replace(c, atomic=atomic) for c in few for atomic in (c.splits > 16, c.splits <= 16)]
    return few


def _candidates(problem: Problem, sizes: tuple[int, ...]) -> Iterator[Config]:
    backward, weights = problem.kind == "dgrad", problem.kind == "wgrad"
    height, width = (problem.H, problem.W) if backward else problem.out_size
    read, free = (problem.O, problem.C) if backward else (problem.C, problem.O)
    pixels = problem.N * problem.H * problem.W
    recuts = [2**i for i in range(8) if pixels % 2**i == 0] if _pointwise(problem) else []
    seen = set()
    for columns in sorted({*range(1, min(width, 64) + 1), 16, *recuts}, reverse=True):
        if backward and columns % problem.stride[1] and columns < width:
            continue
        run = power_of_two(columns * free, 16 if weights else 1)
        span = len(_met(problem, 1, columns)) * read
        for block_read in {power_of_two(span, 16), power_of_two(span + 16 // problem.element_size, 16)}:
            for stack in (1,) if weights else (1, 2, 4):
                block_written = max(16, stack * run)
                if max(block_read, block_written) > 256:
                    continue
                blocks = (block_written, block_read) if backward else (block_read, block_written)
                tiles = [_tile(problem.N, height, columns, rows, block_written // run) for rows in sizes]
                if columns in recuts and block_written == run:
                    tiles += [(1, rows, columns) for rows in sizes]
                p = bands(problem, Config("band", tiles[0], *blocks))
                # Fewer columns in the same blocks are worth a look only where descriptors take them.
                kind = (*blocks, p.stack, columns in recuts, p.load, p.store)
                if kind not in seen:
                    seen.add(kind)
                    yield from (Config("band", tile, *blocks) for tile in tiles)


def _tile(images: int, height: int, columns: int, rows: int, stack: int) -> tuple[int, int, int]:
    """The tile of `rows` row groups that wastes the fewest, and among those the tallest: its reads are the longest."""
    choices = []
    groups = 1
    while groups <= rows:
        tall, many = groups * stack, rows // groups
        padded = cdiv(height, tall) * tall * cdiv(images, many) * many
        if tall <= 256 and many <= 256:
            choices.append((padded, -tall, (many, tall, columns)))
        groups *= 2
    return min(choices)[2]


def _resources(problem: Problem, config: Config, warps: int | None = None) -> Config:
    """`config` with warps, stages (one or none where shared memory holds no two) and, in wgrad, splits."""
    p = bands(problem, config)
    config = replace(config, warps=warps or _warps(problem, config))
    fit = SHARED // _stage_bytes(p, config)
    if problem.kind != "wgrad":
        return replace(config, stages=min(len(p.rows) + 1, 4, fit))
    shares = row_groups(p, config)[1]
    return replace(config, stages=min(3, fit), splits=max(1, min(p.member_tiles, PROGRAMS // (problem.K * shares))))


def _warps(problem: Problem, config: Config) -> int:
    """Four; eight where that gains: registers for sums or for gathered addresses, or rows of wgrad that share a read.

    Eight warps on Hopper's matrix units have a public history of silent errors, so they have to be worth it.
    """
    four, eight = (replace(config, warps=warps) for warps in (4, 8))
    p = bands(problem, four)
    if _gathers(p) and p.product_rows * max(p.block_read, p.run * p.stack) > (
        1024 if problem.kind == "wgrad" else 2048
    ):
        return 8
    if problem.kind == "wgrad" and row_groups(p, four) != row_groups(p, eight):
        return 8
    return 4 if _fits_registers(p, four) else 8


def _gathers(p: Bands) -> bool:
    """Whether threads hold addresses of single values: crops may begin anywhere."""
    return not p.load or p.problem.layout == "crops"


def _fits_registers(p: Bands, config: Config) -> bool:
    """Whether what a program adds up and addresses leaves registers: limits found by compiling."""
    threads = 32 * config.warps
    if p.problem.kind != "wgrad":
        return 2 * p.product_rows * p.run * p.stack <= ACCUMULATORS * threads  # the rest is for what is fused
    addressed = p.product_rows * p.block_read * row_groups(p, config)[0] if _gathers(p) else 0
    each = 16 if p.problem.layout == "crops" else 32  # a crop's windows have an offset, too
    return 4 * p.block_read * p.run <= ACCUMULATORS * threads and addressed <= each * threads


def _gathers(p: Bands) -> int:
    """Vectors of weights that all programs together gather to form their bands."""
    vector = gcd(16 // p.problem.element_size, p.problem.C)
    return p.problem.K * p.member_tiles * len(p.rows) * p.block_read * p.run * p.stack // vector


def _cost(problem: Problem, config: Config) -> float:
    """Predicted seconds on an H100, good for an order only."""
    p = bands(problem, config)
    size = problem.element_size
    rate = {2: 400e12, 4: 200e12 if problem.dtype == "tf32" else 30e12}[size]
    count = programs(problem, config)
    read = problem.K * p.member_tiles * p.product_rows * len(p.rows) * p.block_read
    written = problem.K * p.problem.N * p.written.height * p.written.values
    vectors = 0 if p.load else read / p.vector
    vectors += 0 if p.store else written / p.vector_written
    if problem.kind == "wgrad":
        written = 2 * count * row_groups(p, config)[0] * p.block_read * p.run
    else:
        vectors += read / p.product_rows * p.run * p.stack / 8 if p.expand else _gathers(p)
    memory = (l2_bytes(problem, config) + written * size) / 5.5e12
    seconds = max(memory, executed_flops(problem, config) / rate) + vectors / VECTORS
    pointers = (not p.load) + (not p.store)
    return seconds * max(1.0, PROGRAMS / 2 / count) * POINTERS**pointers


def _recut(problem: Problem, config: Config) -> bool:
    """Whether a member's pixels, one long stream to a 1×1 kernel, are cut into rows of the tile's columns."""
    pixels = problem.N * problem.H * problem.W
    return _pointwise(problem) and config.tile[0] == 1 and pixels % config.tile[2] == 0


def _pointwise(problem: Problem) -> bool:
    plain = problem.taps == 1 and problem.stride == (1, 1) and problem.padding == (0, 0)
    return plain and problem.layout == "member"


def _met(problem: Problem, axis: int, count: int) -> range:
    """The read pixels, along an axis, that the first `count` written ones meet; in dgrad dy's that dx's meet."""
    pairs = problem.kernel, problem.stride, problem.padding, problem.dilation
    return _met_along(problem.kind == "dgrad", axis == 0, count, *(pair[axis] for pair in pairs))


@functools.lru_cache(maxsize=1024)
def _met_along(backward: bool, rows: bool, count: int, kernel: int, s: int, pad: int, d: int) -> range:
    if backward:
        u = {i + pad - k * d for i in range(count) for k in range(kernel)}
        found = {i // s for i in u if i % s == 0}
    else:
        found = {i * s - pad + k * d for i in range(count) for k in range(kernel)}
    if not found:
        return range(0)
    # Rows are loaded one by one, so that those between need not be; the pixels of a row come together.
    step = gcd(*(i - min(found) for i in found)) if rows else 1
    return range(min(found), max(found) + 1, step or 1)


def _sectors(p: Bands, size: int) -> int:
    """Bytes of all segments of one read row, in whole sectors; what descriptors fill with zeros is not read."""
    if p.problem.layout == "crops":
        return p.tiles[2] * (cdiv(p.block_read * size, SECTOR) + 1) * SECTOR
    total = 0
    for segment in range(p.tiles[2]):
        start = (segment * p.advance + p.first) * p.read.channels // p.vector * p.vector
        begin, end = (min(max(v, 0), p.read.values) * size for v in (start, start + p.block_read))
        total += (cdiv(end, SECTOR) - begin // SECTOR) * SECTOR if end > begin else 0
    return total
