/* The functions of deltafmt._core that run loops: they check what they are given, and say which loop it is for.
 *
 * The arguments of each stand in its body, in their order; shapes are those of the Python function that calls it.
 */
#include "functions.h"

#include <stdlib.h>

const struct loops *loops = &loops_baseline;

static size_t up(size_t count, size_t step) { return (count + step - 1) / step; }

static size_t words_of(size_t count, size_t width) {
    size_t words = 0;
    while (width) {
        size_t plane = 1;
        while (plane * 2 <= width && plane < WORD_BITS) plane *= 2;
        words += up(count * plane, WORD_BITS);
        width -= plane;
    }
    return words;
}

static size_t tiles_of(size_t rows, size_t share) { return up(rows, TILE_ROWS * share) * share; }

static int is_share(uint64_t share) { return share == 1 || share == 2 || share == 4 || share == 8; }

/* Tells whether an array is that of `per_row` elements a row, in tiles of 32 rows. */
static int is_tiled(const Py_buffer *view, size_t rows, size_t per_row, size_t share) {
    return extent(view, 0) == tiles_of(rows, share) && extent(view, 1) == per_row && extent(view, 2) == TILE_ROWS;
}

static size_t scales_a_row(size_t entries, size_t group) { return entries ? up(entries, group) : 1; }

/* Kept entries: positions, m, share and columns. */
static struct kept kept_of(struct call *call, size_t rows, size_t columns) {
    const Py_buffer *positions = array(call, "B", 3, 0);
    struct kept kept = {positions->buf, extent(positions, 1), extent(positions, 2), 0, 0, columns};
    kept.m = number(call, 2, 255);
    kept.share = number(call, 1, 8);
    require(call, is_share(kept.share), "a share is 1, 2, 4 or 8");
    if (call->wrong) return kept;
    require(call, columns <= UINT32_MAX - 255, "a row has fewer than 2**32 columns");
    require(call, kept.n >= 1 && kept.n <= kept.m, "N is 1 to M");
    require(call, extent(positions, 0) == up(rows, kept.share), "there are positions for every mask row");
    require(call, kept.groups == up(columns, kept.m), "there are positions for every group");
    if (!call->wrong)
        require(call, loops->positions_ok(kept.positions, extent(positions, 0) * kept.groups, kept.n, kept.m, 0),
                "positions are below M");
    return kept;
}

/* How codes are made: bits, midtread, search, group, scale dtype, factors, refinements. */
static struct quantizer quantizer_of(struct call *call, size_t entries) {
    struct quantizer q = {0};
    q.bits = (int)number(call, 1, 8);
    q.midtread = (int)number(call, 0, 1);
    q.search = (int)number(call, 0, 1);
    q.group = number(call, 1, INT32_MAX);
    q.scale_dtype = dtype(call);
    const Py_buffer *factors = array(call, "f", 1, 0);
    q.factors = factors->buf;
    q.candidates = extent(factors, 0);
    q.refinements = (int)number(call, 0, 64);
    require(call, !(q.midtread && q.bits == 1), "a midtread grid has at least 2 bits");
    require(call, q.scale_dtype != F16, "scales are BF16 or F32");
    if (q.group > entries) q.group = entries ? entries : 1;
    return q;
}

/* ---- Floats ---- */

PyObject *subtract(struct call *call) {
    enum dtype a, b;
    const Py_buffer *left, *right;
    raw(call, 1, 0, &a, &left);
    raw(call, 1, 0, &b, &right);
    const Py_buffer *out = array(call, "f", 1, 1);
    size_t n = extent(out, 0);
    require(call, extent(left, 0) == n && extent(right, 0) == n, "all arrays have as many elements");
    int status = DONE;
    RUN(call, status = loops->subtract(left->buf, a, right->buf, b, n, out->buf));
    return finish(call, PyBool_FromLong, status == DONE);
}

PyObject *add(struct call *call) {
    enum dtype b, d;
    const Py_buffer *base, *out;
    raw(call, 1, 0, &b, &base);
    const Py_buffer *delta = array(call, "f", 1, 0);
    raw(call, 1, 1, &d, &out);
    size_t n = extent(out, 0);
    require(call, extent(base, 0) == n && extent(delta, 0) == n, "all arrays have as many elements");
    RUN(call, loops->add(base->buf, b, delta->buf, n, out->buf, d));
    return finish(call, nothing, 0);
}

/* ---- Positions ---- */

PyObject *seeded(struct call *call) {
    const Py_buffer *out = array(call, "B", 3, 1);
    uint32_t seed = (uint32_t)number(call, 0, UINT32_MAX);
    uint64_t first = number(call, 0, INT64_MAX), m = number(call, 2, 128), lane_bits = number(call, 4, 16);
    require(call, !(m & (m - 1)), "M is a power of two");
    require(call, lane_bits == 4 || lane_bits == 8 || lane_bits == 16, "a lane has 4, 8 or 16 bits");
    RUN(call, loops->seeded(seed, first, extent(out, 0), extent(out, 1), extent(out, 2), m, (int)lane_bits, out->buf));
    return finish(call, nothing, 0);
}

PyObject *uniform(struct call *call) {
    const Py_buffer *out = array(call, "B", 3, 1);
    uint32_t seed = (uint32_t)number(call, 0, UINT32_MAX);
    uint64_t first = number(call, 0, INT64_MAX), m = number(call, 2, 255);
    require(call, extent(out, 2) <= m, "N is at most M");
    RUN(call, loops->uniform(seed, first, extent(out, 0), extent(out, 1), extent(out, 2), m, out->buf));
    return finish(call, nothing, 0);
}

PyObject *draw(struct call *call) {
    const Py_buffer *out = array(call, "?", 2, 1);
    uint32_t seed = (uint32_t)number(call, 0, UINT32_MAX);
    uint64_t first = number(call, 0, INT64_MAX), least = number(call, 0, 1ull << 32);
    RUN(call, loops->draw(seed, first, extent(out, 0), extent(out, 1), least, out->buf));
    return finish(call, nothing, 0);
}

PyObject *ascending(struct call *call) {
    const Py_buffer *positions = array(call, "B", 3, 0);
    size_t m = number(call, 2, 255);
    int ok = 0;
    RUN(call, ok = loops->positions_ok(positions->buf, extent(positions, 0) * extent(positions, 1), extent(positions, 2),
                                       m, 1));
    return finish(call, PyBool_FromLong, ok);
}

PyObject *rank(struct call *call) {
    const Py_buffer *positions = array(call, "B", 3, 0), *table = array(call, "L", 2, 0), *out = array(call, "L", 2, 1);
    size_t groups = extent(out, 0) * extent(out, 1), n = extent(table, 0), m = extent(table, 1);
    require(call, extent(positions, 0) == extent(out, 0) && extent(positions, 1) == extent(out, 1) &&
                      extent(positions, 2) == n, "there is a rank for every group");
    if (!call->wrong) require(call, loops->positions_ok(positions->buf, groups, n, m, 0), "positions are below M");
    RUN(call, loops->rank(positions->buf, groups, n, m, table->buf, out->buf));
    return finish(call, nothing, 0);
}

PyObject *unrank(struct call *call) {
    const Py_buffer *ranks = array(call, "L", 2, 0), *table = array(call, "L", 2, 0), *out = array(call, "B", 3, 1);
    size_t groups = extent(ranks, 0) * extent(ranks, 1), n = extent(table, 0), m = extent(table, 1);
    require(call, extent(out, 0) == extent(ranks, 0) && extent(out, 1) == extent(ranks, 1) && extent(out, 2) == n,
            "there are positions for every rank");
    require(call, n >= 1 && n <= m && m <= 255, "the table has N rows of M columns");
    RUN(call, loops->unrank(ranks->buf, groups, n, m, table->buf, out->buf));
    return finish(call, nothing, 0);
}

/* ---- Words ---- */

static size_t words_scratch(size_t count, size_t width) { return words_of(count, width) * 4 + up(count, 32) * 32; }

PyObject *pack_words(struct call *call) {
    const Py_buffer *fields = array(call, "BHL", 2, 0);
    size_t width = number(call, 1, 64);
    const Py_buffer *out = array(call, "I", 3, 1);
    size_t share = number(call, 1, 8), rows = extent(fields, 0), count_of = extent(fields, 1);
    require(call, is_share(share), "a share is 1, 2, 4 or 8");
    require(call, is_tiled(out, rows, words_of(count_of, width), share), "the words have the fields' tiles");
    void *scratch = scratch_of(call, words_scratch(count_of, width));
    RUN(call, loops->pack_words(fields->buf, (size_t)fields->itemsize, rows, count_of, (int)width, share, out->buf,
                                scratch));
    free(scratch);
    return finish(call, nothing, 0);
}

/* Unpacks fields `first` to `first + n` of rows of `count_of`; out has shape (rows, n). With share 0, a row is a line. */
PyObject *unpack_words(struct call *call) {
    size_t share = number(call, 0, 8);
    const Py_buffer *packed = array(call, "I", share ? 3 : 2, 0);
    size_t count_of = number(call, 0, INT64_MAX / 128), first = number(call, 0, INT64_MAX / 128), width = number(call, 1, 64);
    const Py_buffer *out = array(call, "BHL", 2, 1);
    size_t rows = extent(out, 0), n = extent(out, 1), words = words_of(count_of, width);
    require(call, !share || is_share(share), "a share is 1, 2, 4 or 8");
    require(call, share ? is_tiled(packed, rows, words, share) : extent(packed, 0) == rows && extent(packed, 1) == words,
            "the words are those of the rows");
    require(call, first % 32 == 0 && n <= count_of && first <= count_of - n, "a run starts on a multiple of 32 fields");
    require(call, width <= (size_t)out->itemsize * 8, "a field fits its array");
    void *scratch = scratch_of(call, words_scratch(n, width));
    RUN(call, loops->unpack_words(packed->buf, rows, count_of, first, first + n, (int)width, share, out->buf,
                                  (size_t)out->itemsize, scratch));
    free(scratch);
    return finish(call, nothing, 0);
}

/* ---- Kept entries, scales and codes ---- */

PyObject *gather(struct call *call) {
    enum dtype a, b;
    const Py_buffer *left, *right;
    raw(call, 2, 0, &a, &left);
    raw(call, 2, 0, &b, &right);
    size_t rows = extent(right, 0), columns = extent(right, 1);
    struct kept kept = kept_of(call, rows, columns);
    float factor = real(call);
    const Py_buffer *out = array(call, "f", 2, 1);
    require(call, extent(left, 0) == rows && extent(left, 1) == columns, "both sides have one shape");
    require(call, extent(out, 0) == rows && extent(out, 1) == kept.groups * kept.n, "there is room for every entry");
    void *scratch = scratch_of(call, (columns + kept.groups * kept.n) * 4);
    int status = DONE;
    RUN(call, status = loops->gather(left->buf, a, right->buf, b, rows, &kept, factor, out->buf, scratch));
    free(scratch);
    return finish(call, PyBool_FromLong, status == DONE);
}

PyObject *quantize(struct call *call) {
    const Py_buffer *values = array(call, "f", 2, 0);
    size_t rows = extent(values, 0), entries = extent(values, 1);
    struct quantizer q = quantizer_of(call, entries);
    const Py_buffer *fields = array(call, "B", 2, 1), *scales = array(call, "f", 2, 1);
    require(call, extent(fields, 0) == rows && extent(fields, 1) == entries, "there is a field for every entry");
    require(call, extent(scales, 0) == rows && extent(scales, 1) == scales_a_row(entries, q.group ? q.group : 1),
            "there is a scale for every group");
    void *scratch = scratch_of(call, q.group * 4);
    int status = DONE;
    RUN(call, status = loops->quantize(values->buf, rows, entries, &q, fields->buf, scales->buf, scratch));
    free(scratch);
    return finish(call, PyBool_FromLong, status == DONE);
}

PyObject *scatter(struct call *call) {
    const Py_buffer *codes = array(call, "B", 2, 0), *scales = array(call, "f", 2, 0), *out = array(call, "f", 2, 1);
    size_t rows = extent(out, 0), columns = extent(out, 1), entries = extent(codes, 1);
    struct kept kept = kept_of(call, rows, columns);
    int top = (int)number(call, 0, 255);
    size_t group = number(call, 1, INT32_MAX);
    if (group > entries) group = entries ? entries : 1;
    require(call, extent(codes, 0) == rows && entries == kept.groups * kept.n, "there is a code for every entry");
    require(call, extent(scales, 0) == rows && extent(scales, 1) == scales_a_row(entries, group),
            "there is a scale for every group");
    void *scratch = scratch_of(call, entries * 8);
    RUN(call, loops->scatter(codes->buf, scales->buf, rows, group, top, &kept, out->buf, scratch));
    free(scratch);
    return finish(call, nothing, 0);
}

PyObject *nm_pack(struct call *call) {
    struct nm_pack job = {0};
    const Py_buffer *left, *right;
    job.finetuned = raw(call, 2, 0, &job.finetuned_dtype, &left);
    job.base = raw(call, 2, 0, &job.base_dtype, &right);
    size_t columns = extent(right, 1);
    job.rows = extent(right, 0);
    job.kept = kept_of(call, job.rows, columns);
    job.factor = real(call);
    size_t entries = job.kept.groups * job.kept.n;
    job.quantizer = quantizer_of(call, entries);
    const Py_buffer *codes = array(call, "I", 3, 1), *scales = array(call, "Hf", 3, 1);
    job.codes = codes->buf;
    job.scales = scales->buf;
    require(call, extent(left, 0) == job.rows && extent(left, 1) == columns, "both sides have one shape");
    if (!call->wrong) {
        size_t words = words_of(entries, (size_t)job.quantizer.bits), per_row = scales_a_row(entries, job.quantizer.group);
        require(call, is_tiled(codes, job.rows, words, job.kept.share), "the words have the rows' tiles");
        require(call, is_tiled(scales, job.rows, per_row, job.kept.share), "the scales have the rows' tiles");
        require(call, scales->itemsize == (job.quantizer.scale_dtype == BF16 ? 2 : 4), "scales have their dtype's size");
    }
    void *scratch = scratch_of(call, columns * 4 + entries * 16 + words_scratch(entries, 8) + 64);
    int status = DONE;
    RUN(call, status = loops->nm_pack(&job, scratch));
    free(scratch);
    return finish(call, PyBool_FromLong, status == DONE);
}

PyObject *nm_unpack(struct call *call) {
    struct nm_unpack job = {0};
    const Py_buffer *codes = array(call, "I", 3, 0), *scales = array(call, "f", 2, 0), *base, *out;
    job.base = raw(call, 2, 0, &job.base_dtype, &base);
    raw(call, 2, 1, &job.dtype, &out);
    job.codes = codes->buf;
    job.scales = scales->buf;
    job.out = out->buf;
    job.rows = extent(base, 0);
    job.kept = kept_of(call, job.rows, extent(base, 1));
    job.bits = (int)number(call, 1, 8);
    job.top = (int)number(call, 0, 255);
    job.group = number(call, 1, INT32_MAX);
    size_t entries = job.kept.groups * job.kept.n;
    if (job.group > entries) job.group = entries ? entries : 1;
    require(call, extent(out, 0) == job.rows && extent(out, 1) == extent(base, 1), "the result has the base's shape");
    if (!call->wrong) {
        require(call, is_tiled(codes, job.rows, words_of(entries, (size_t)job.bits), job.kept.share),
                "the words have the rows' tiles");
        require(call, extent(scales, 0) == job.rows && extent(scales, 1) == scales_a_row(entries, job.group),
                "there is a scale for every group");
    }
    void *scratch = scratch_of(call, entries * 12 + words_scratch(entries, 8) + 64);
    RUN(call, loops->nm_unpack(&job, scratch));
    free(scratch);
    return finish(call, nothing, 0);
}

/* ---- Dense codes, outer products ---- */

PyObject *dequantize(struct call *call) {
    const Py_buffer *codes = array(call, "B", 2, 0);
    int step = (int)number(call, 1, 2);
    const Py_buffer *offsets = array(call, "i", 2, 0), *factors = array(call, "f", 2, 0);
    size_t group = number(call, 1, INT32_MAX), rows = extent(codes, 0), columns = extent(codes, 1);
    const Py_buffer *out = array(call, "f", 2, 1);
    size_t per_row = up(columns, group);
    require(call, extent(out, 0) == rows && extent(out, 1) == columns, "there is a value for every code");
    require(call, extent(offsets, 0) == rows && extent(factors, 0) == rows && extent(offsets, 1) == per_row &&
                      extent(factors, 1) == per_row, "every group has an offset and a factor");
    RUN(call, loops->dequantize(codes->buf, rows, columns, step, offsets->buf, factors->buf, group, out->buf));
    return finish(call, nothing, 0);
}

PyObject *add_outer(struct call *call) {
    const Py_buffer *u = array(call, "f", 2, 0), *v = array(call, "f", 2, 0), *out = array(call, "f", 2, 1);
    require(call, extent(u, 0) == extent(v, 0) && extent(u, 1) == extent(out, 0) && extent(v, 1) == extent(out, 1),
            "the vectors have the matrix's shape");
    RUN(call, loops->add_outer(u->buf, v->buf, extent(u, 0), extent(out, 0), extent(out, 1), out->buf));
    return finish(call, nothing, 0);
}

/* ---- Sparse ---- */

/* Entries of a matrix: ends, columns of the entries, columns of the matrix, span, filler. */
static struct sparse sparse_of(struct call *call) {
    const Py_buffer *ends = array(call, "l", 1, 0), *positions = array(call, "l", 1, 0);
    struct sparse s = {.rows = extent(ends, 0), .entries = extent(positions, 0)};
    s.ends = ends->buf;
    s.positions = positions->buf;
    s.columns = number(call, 1, INT32_MAX);
    s.span = number(call, 1, 65536);
    s.filler = (uint32_t)number(call, 1, 65535);
    s.blocks = up(s.columns, s.span ? s.span : 1);
    return s;
}

PyObject *sparse_needed(struct call *call) {
    struct sparse s = sparse_of(call);
    const Py_buffer *needed = array(call, "l", 1, 1);
    require(call, extent(needed, 0) == up(s.rows, TILE_ROWS) * s.blocks, "there is a count for every block");
    int status = DONE;
    RUN(call, status = loops->sparse_needed(&s, needed->buf));
    require(call, status == DONE, "columns ascend in every row and lie inside the matrix");
    return finish(call, nothing, 0);
}

PyObject *sparse_place(struct call *call) {
    struct sparse s = sparse_of(call);
    const Py_buffer *starts = array(call, "l", 1, 0), *gaps = array(call, "BH", 2, 1), *values = array(call, "BHI", 1, 0);
    const Py_buffer *placed = array(call, "BHI", 2, 1);
    int by_slot = (int)number(call, 0, 1);
    size_t slots = extent(gaps, 1);
    require(call, extent(starts, 0) == up(s.rows, TILE_ROWS) * s.blocks + 1, "there is a start for every block");
    require(call, extent(gaps, 0) == TILE_ROWS && extent(placed, !by_slot) == slots &&
                      extent(placed, by_slot) == TILE_ROWS, "there is room for every slot");
    require(call, extent(values, 0) == s.entries && values->itemsize == placed->itemsize, "every entry has a value");
    int status = DONE;
    RUN(call, status = loops->sparse_place(&s, starts->buf, slots, gaps->buf, (size_t)gaps->itemsize, values->buf,
                                           (size_t)values->itemsize, placed->buf, by_slot));
    require(call, status == DONE, "every entry has a slot");
    return finish(call, nothing, 0);
}

/* Codes of shape (32, slots) with 32 scales, or raw values of shape (slots, 32). */
PyObject *sparse_tile(struct call *call) {
    struct sparse_tile t = {0};
    const Py_buffer *gaps = array(call, "BH", 2, 0), *starts = array(call, "l", 1, 0);
    t.span = number(call, 1, 65536);
    t.filler = (uint32_t)number(call, 1, 65535);
    int coded = (int)number(call, 0, 1);
    if (coded) {
        const Py_buffer *codes = array(call, "B", 2, 0), *scales = array(call, "f", 1, 0);
        t.top = (int)number(call, 0, 255);
        t.codes = codes->buf;
        t.scales = scales->buf;
        require(call, extent(codes, 0) == TILE_ROWS && extent(codes, 1) == extent(gaps, 1) && extent(scales, 0) == TILE_ROWS,
                "every slot has a code");
    } else {
        const Py_buffer *values;
        t.values = raw(call, 2, 0, &t.dtype, &values);
        require(call, extent(values, 0) == extent(gaps, 1) && extent(values, 1) == TILE_ROWS, "every slot has a value");
    }
    const Py_buffer *out = array(call, "f", 2, 1);
    t.gaps = gaps->buf;
    t.gap_bytes = (size_t)gaps->itemsize;
    t.starts = starts->buf;
    t.slots = extent(gaps, 1);
    t.lanes = extent(out, 0);
    t.columns = extent(out, 1);
    t.out = out->buf;
    t.blocks = up(t.columns, t.span ? t.span : 1);
    require(call, extent(gaps, 0) == TILE_ROWS && t.lanes <= TILE_ROWS, "a tile has 32 rows");
    require(call, extent(starts, 0) == t.blocks + 1, "every block has a start");
    for (size_t i = 0; !call->wrong && i <= t.blocks; i++)
        require(call, t.starts[i] >= (i ? t.starts[i - 1] : 0) && (uint64_t)t.starts[i] <= t.slots, "starts ascend");
    int status = DONE;
    RUN(call, status = loops->sparse_tile(&t));
    return finish(call, PyBool_FromLong, status == DONE);
}

/* Gaps of shape (32, slots), the starts of blocks, and their widths in columns. */
PyObject *sparse_within(struct call *call) {
    const Py_buffer *gaps = array(call, "BH", 2, 0), *starts = array(call, "l", 1, 0), *widths = array(call, "l", 1, 0);
    uint32_t filler = (uint32_t)number(call, 1, 65535);
    size_t slots = extent(gaps, 1), blocks = extent(widths, 0);
    const int64_t *at = starts->buf;
    require(call, extent(gaps, 0) == TILE_ROWS, "a tile has 32 rows");
    require(call, extent(starts, 0) == blocks + 1, "every block has a start");
    if (!call->wrong) require(call, (uint64_t)at[blocks] == slots, "the blocks have all slots");
    for (size_t i = 0; !call->wrong && i <= blocks; i++)
        require(call, at[i] >= (i ? at[i - 1] : 0) && (uint64_t)at[i] <= slots, "starts ascend");
    int ok = 0;
    RUN(call, ok = loops->sparse_within(gaps->buf, (size_t)gaps->itemsize, slots, at, widths->buf, blocks, filler));
    return finish(call, PyBool_FromLong, ok);
}

/* ---- Exact tensors ---- */

/* The prediction, whether units are floats, the bits that sort, and marks, of which none may be there. */
static struct exact exact_of(struct call *call, const void *values, size_t count, size_t width) {
    const Py_buffer *prediction = array(call, "BHIL", 1, 0);
    struct exact e = {.values = values, .prediction = prediction->buf};
    e.count = extent(prediction, 0), e.width = (size_t)prediction->itemsize;
    e.is_float = (int)number(call, 0, 1);
    e.shift = (int)number(call, 0, 63);
    e.bits = (int)number(call, 0, MAX_KEY_BITS);
    const Py_buffer *marks = array(call, "?", 1, 0);
    if (call->wrong) return e;
    if (extent(marks, 0)) e.marks = marks->buf;
    if (values) require(call, e.count == count && e.width == width, "values are as many and as wide as predictions");
    require(call, e.count <= INT32_MAX, "a chunk has fewer than 2**31 units");
    require(call, (size_t)(e.shift + e.bits) <= 8 * e.width, "the bits that sort lie in a unit");
    require(call, !e.marks || extent(marks, 0) == e.count, "there is a mark for each unit");
    return e;
}

/* Room for the codes of all units, if they are sorted. */
static void *exact_codes(struct call *call, const struct exact *e) {
    const Py_buffer *codes = array(call, "B", 1, 1);
    require(call, extent(codes, 0) >= (e->bits || e->marks ? e->count * e->width : 0), "there is room for the sorted codes");
    require(call, !((uintptr_t)codes->buf % 8), "this room is aligned");
    return codes->buf;
}

PyObject *exact_split(struct call *call) {
    const Py_buffer *values = array(call, "BHIL", 1, 0);
    struct exact e = exact_of(call, values->buf, extent(values, 0), (size_t)values->itemsize);
    const Py_buffer *planes = rows(call, 1, &e.stride), *counts = array(call, "L", 1, 1);
    require(call, extent(planes, 0) == e.width && extent(planes, 1) == e.count, "there is a plane for each byte");
    require(call, extent(counts, 0) == (e.marks ? (size_t)2 : 1) << e.bits, "there is a count for each key");
    e.planes = planes->buf;
    e.sorted = exact_codes(call, &e);
    RUN(call, loops->exact_split(&e, counts->buf));
    return finish(call, nothing, 0);
}

PyObject *exact_join(struct call *call) {
    size_t stride;
    const Py_buffer *planes = rows(call, 0, &stride);
    struct exact e = exact_of(call, NULL, 0, 0);
    const Py_buffer *out = array(call, "BHIL", 1, 1);
    e.stride = stride;
    require(call, extent(planes, 0) == e.width && extent(planes, 1) == e.count, "there is a plane for each byte");
    require(call, extent(out, 0) == e.count && (size_t)out->itemsize == e.width, "the result is as wide and as long");
    e.planes = planes->buf;
    e.out = out->buf;
    e.sorted = exact_codes(call, &e);
    RUN(call, loops->exact_join(&e));
    return finish(call, nothing, 0);
}

/* Checks that numbers ascend, each below `end`. */
static void require_ascending(struct call *call, const Py_buffer *numbers, size_t end, const char *claim) {
    const int64_t *at = numbers->buf;
    size_t count = call->wrong ? 0 : extent(numbers, 0);
    int ascend = !count || (at[0] >= 0 && (uint64_t)at[count - 1] < end);
    for (size_t i = 1; i < count; i++) ascend &= at[i] > at[i - 1];
    require(call, ascend, claim);
}

PyObject *exact_ranks(struct call *call) {
    struct exact e = exact_of(call, NULL, 0, 0);
    const Py_buffer *places = array(call, "l", 1, 0), *counts = array(call, "L", 1, 1), *ranks = array(call, "l", 1, 1);
    require(call, !e.marks, "ranks know no marks");
    require(call, extent(counts, 0) == (size_t)1 << e.bits, "there is a count for each key");
    require(call, extent(places, 0) == extent(ranks, 0), "there is a rank for each place");
    require_ascending(call, places, e.count, "places ascend among the units");
    RUN(call, loops->exact_ranks(&e, places->buf, extent(places, 0), counts->buf, ranks->buf));
    return finish(call, nothing, 0);
}

PyObject *exact_find(struct call *call) {
    struct exact e = exact_of(call, NULL, 0, 0);
    const Py_buffer *ranks = array(call, "l", 1, 0), *places = array(call, "l", 1, 1);
    require(call, extent(places, 0) == extent(ranks, 0), "there is a place for each rank");
    require_ascending(call, ranks, e.count, "ranks ascend among the units");
    e.table = scratch_of(call, find_scratch(&e));
    RUN(call, loops->exact_find(&e, ranks->buf, extent(ranks, 0), places->buf));
    free(e.table);
    return finish(call, nothing, 0);
}

/* Two arrays of units, and room for the places of those that differ; returns how many there are. */
PyObject *exact_differ(struct call *call) {
    const Py_buffer *values = array(call, "BHIL", 1, 0), *prediction = array(call, "BHIL", 1, 0);
    const Py_buffer *places = array(call, "l", 1, 1);
    struct exact e = {.values = values->buf, .prediction = prediction->buf, .count = extent(values, 0)};
    e.width = (size_t)values->itemsize;
    require(call, extent(prediction, 0) == e.count && prediction->itemsize == values->itemsize, "both are units alike");
    require(call, extent(places, 0) >= PLACES_RUN, "there is room for a run of places");
    size_t found = 0;
    RUN(call, found = loops->exact_differ(&e, extent(places, 0) - PLACES_RUN, places->buf));
    return finish(call, PyLong_FromLong, (long)found);
}

/* Planes, and room for the places that are not zero in all of them; returns how many there are. */
PyObject *exact_filled(struct call *call) {
    struct exact e = {0};
    const Py_buffer *planes = rows(call, 0, &e.stride), *places = array(call, "l", 1, 1);
    e.planes = planes->buf, e.width = extent(planes, 0), e.count = extent(planes, 1);
    require(call, extent(places, 0) >= PLACES_RUN, "there is room for a run of places");
    size_t found = 0;
    RUN(call, found = loops->exact_filled(&e, extent(places, 0) - PLACES_RUN, places->buf));
    return finish(call, PyLong_FromLong, (long)found);
}

/* A sample of units and of what predicts them, and n log2 n for each count; tells whether the units are smaller alone. */
PyObject *exact_unrelated(struct call *call) {
    const Py_buffer *values = array(call, "BHIL", 1, 0), *prediction = array(call, "BHIL", 1, 0);
    struct exact e = {.values = values->buf, .prediction = prediction->buf, .count = extent(values, 0)};
    e.is_float = (int)number(call, 0, 1);
    e.width = (size_t)values->itemsize;
    const Py_buffer *logs = array(call, "L", 1, 0);
    require(call, extent(prediction, 0) == e.count && prediction->itemsize == values->itemsize, "both are units alike");
    require(call, e.count <= EXACT_SAMPLE && extent(logs, 0) == EXACT_SAMPLE + 1, "there is a number for each count");
    e.sorted = scratch_of(call, e.count * e.width);
    int found = 0;
    RUN(call, found = loops->exact_unrelated(&e, logs->buf));
    free(e.sorted);
    return finish(call, PyBool_FromLong, found);
}

/* Bytes, and a count for each of their 256 values. */
PyObject *count_bytes(struct call *call) {
    const Py_buffer *data = array(call, "B", 1, 0), *counts = array(call, "I", 1, 1);
    require(call, extent(data, 0) <= UINT32_MAX, "there are fewer than 2**32 bytes");
    require(call, extent(counts, 0) == 256, "there is a count for each value");
    RUN(call, loops->count_bytes(data->buf, extent(data, 0), counts->buf));
    return finish(call, nothing, 0);
}

/* Checks that numbers lie below their end. */
static void require_within(struct call *call, const Py_buffer *places, size_t end) {
    const uint64_t *at = places->buf;
    size_t count = call->wrong ? 0 : extent(places, 0);
    int within = 1;
    for (size_t i = 0; i < count; i++) within &= at[i] < end;
    require(call, within, "numbers lie below their end");
}

/* Units, places, and room for the units there. */
PyObject *exact_take(struct call *call) {
    const Py_buffer *units = array(call, "BHIL", 1, 0), *places = array(call, "l", 1, 0), *out = array(call, "BHIL", 1, 1);
    require(call, out->itemsize == units->itemsize && extent(out, 0) == extent(places, 0), "there is room for each unit");
    require_within(call, places, extent(units, 0));
    RUN(call, loops->exact_take(units->buf, (size_t)units->itemsize, places->buf, extent(places, 0), out->buf));
    return finish(call, nothing, 0);
}

/* Units, places, and the units that are written there. */
PyObject *exact_put(struct call *call) {
    const Py_buffer *units = array(call, "BHIL", 1, 1), *places = array(call, "l", 1, 0), *values = array(call, "BHIL", 1, 0);
    require(call, values->itemsize == units->itemsize && extent(values, 0) == extent(places, 0), "a unit for each place");
    require_within(call, places, extent(units, 0));
    RUN(call, loops->exact_put(units->buf, (size_t)units->itemsize, places->buf, extent(places, 0), values->buf));
    return finish(call, nothing, 0);
}

/* Numbers, what they are below, and a count for each gap between them in ascending order. */
PyObject *exact_gaps(struct call *call) {
    const Py_buffer *numbers = array(call, "l", 1, 0);
    size_t end = number(call, 0, INT32_MAX), words = up(end, 64);
    const Py_buffer *counts = array(call, "L", 1, 1);
    require(call, extent(counts, 0) == 256, "there is a count for each byte");
    require_within(call, numbers, end);
    uint64_t *set = scratch_of(call, words * sizeof *set);
    RUN(call, loops->exact_gaps(numbers->buf, extent(numbers, 0), set, words, counts->buf));
    free(set);
    return finish(call, nothing, 0);
}

/* A plane of bytes; tells whether it may repeat. */
PyObject *may_repeat(struct call *call) {
    const Py_buffer *data = array(call, "B", 1, 0);
    int found = 0;
    RUN(call, found = loops->may_repeat(data->buf, extent(data, 0)));
    return finish(call, PyBool_FromLong, found);
}

/* Bytes, the ends of their segments, and room for a frame; returns the bytes of the frame. */
PyObject *plane_frame(struct call *call) {
    const Py_buffer *data = array(call, "B", 1, 0), *ends = array(call, "L", 1, 0), *out = array(call, "B", 1, 1);
    size_t count = extent(data, 0), segments = extent(ends, 0), found = 0;
    const uint64_t *at = ends->buf;
    require(call, count >= 1 && count <= UINT32_MAX, "a frame holds 1 to 2**32 - 1 bytes");
    require(call, segments >= 1 && segments <= count, "there is a segment");
    for (size_t i = 0; !call->wrong && i < segments; i++)
        require(call, at[i] > (i ? at[i - 1] : 0) && at[i] <= count, "the ends of segments ascend");
    if (!call->wrong) require(call, at[segments - 1] == count, "the last segment ends where the bytes do");
    require(call, extent(out, 0) >= FRAME_ROOM(count, segments), "there is room for the frame");
    void *scratch = scratch_of(call, FRAME_SCRATCH);
    RUN(call, found = loops->plane_frame(data->buf, at, segments, out->buf, scratch));
    free(scratch);
    return finish(call, PyLong_FromLong, (long)found);
}
