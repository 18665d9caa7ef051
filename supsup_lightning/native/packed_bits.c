/* Products over packed bits, read at the speed of memory.
 *
 * Bit j of byte b of a row is weight 8 b + j; spare bits of the last byte are 0. Rows are masks.
 *
 *   packed_dot           out[m] = sum_w bit(m, w) * vector[w]
 *   packed_weighted_sum  out[w] = sum_m coefficient[m] * bit(m, w), where rows with a coefficient of 0 are not read
 *   packed_select        out[m][w] = bit(m, w) * vector[w]
 *
 * With AVX-512, half bytes of 16 masks pick their sums from tables (dot), and a 16-bit word of a mask is the lane mask of
 * one addition (weighted_sum) or load (select); nothing is ever unpacked. AVX2 and the portable version expand a byte to
 * eight lanes. The best of them is chosen when the library is loaded. Threads are the caller's: the products work on a
 * range, dot of masks and weighted_sum of bytes.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Weights in one tile of dot: its floats stay in the L1 cache while all masks pass by. A sum within a tile is float32,
 * sums of tiles are double, so that rounding does not grow with the number of weights. */
#define TILE 4096
/* Bytes of a row, and rows, that weighted_sum goes over at a time. */
#define STRETCH 512
#define ROWS 64

typedef void (*dot_tile)(const uint8_t *rows, size_t stride, size_t masks, size_t bytes, const float *vector, double *sums);
typedef void (*select_row)(const uint8_t *row, size_t bytes, const float *vector, float *out);
typedef void (*sum_tile)(const uint8_t *rows, size_t stride, size_t masks, const float *coefficients, float *out);

/* Portable: eight lanes per byte, as integers, which compilers turn into whatever vectors the processor has. */

static inline void lanes_on(uint8_t byte, const float *value, float *lanes)
{
    uint32_t bits[8];
    memcpy(bits, value, sizeof bits);
    for (int j = 0; j < 8; j++)
        bits[j] &= (byte & (1u << j)) ? 0xffffffffu : 0u;
    memcpy(lanes, bits, sizeof bits);
}

static void dot_tile_portable(const uint8_t *rows, size_t stride, size_t masks, size_t bytes, const float *vector, double *sums)
{
    for (size_t m = 0; m < masks; m++) {
        const uint8_t *row = rows + m * stride;
        float lanes[8] = {0}, on[8];
        for (size_t b = 0; b < bytes; b++) {
            lanes_on(row[b], vector + 8 * b, on);
            for (int j = 0; j < 8; j++)
                lanes[j] += on[j];
        }
        for (int j = 0; j < 8; j++)
            sums[m] += lanes[j];
    }
}

/* 64 bytes of each row: 512 weights. */
static void sum_tile_portable(const uint8_t *rows, size_t stride, size_t masks, const float *coefficients, float *out)
{
    for (size_t m = 0; m < masks; m++) {
        float a[8], on[8];
        for (int j = 0; j < 8; j++)
            a[j] = coefficients[m];
        for (size_t b = 0; b < 64 && coefficients[m] != 0; b++) {
            lanes_on(rows[m * stride + b], a, on);
            for (int j = 0; j < 8; j++)
                out[8 * b + j] += on[j];
        }
    }
}

static void select_portable(const uint8_t *row, size_t bytes, const float *vector, float *out)
{
    for (size_t b = 0; b < bytes; b++)
        lanes_on(row[b], vector + 8 * b, out + 8 * b);
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

__attribute__((target("avx2")))
static inline __m256 lanes_of(uint8_t byte)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit));
}

__attribute__((target("avx2")))
static void dot_tile_avx2(const uint8_t *rows, size_t stride, size_t masks, size_t bytes, const float *vector, double *sums)
{
    size_t m = 0;
    for (; m + 4 <= masks; m += 4) {
        const uint8_t *row = rows + m * stride;
        __m256 s[4];
        for (int i = 0; i < 4; i++)
            s[i] = _mm256_setzero_ps();
        for (size_t b = 0; b < bytes; b++) {
            __m256 v = _mm256_loadu_ps(vector + 8 * b);
            for (int i = 0; i < 4; i++)
                s[i] = _mm256_add_ps(s[i], _mm256_and_ps(lanes_of(row[i * stride + b]), v));
        }
        for (int i = 0; i < 4; i++) {
            float lanes[8];
            _mm256_storeu_ps(lanes, s[i]);
            for (int j = 0; j < 8; j++)
                sums[m + i] += lanes[j];
        }
    }
    if (m < masks)
        dot_tile_portable(rows + m * stride, stride, masks - m, bytes, vector, sums + m);
}

__attribute__((target("avx2")))
static void sum_tile_avx2(const uint8_t *rows, size_t stride, size_t masks, const float *coefficients, float *out)
{
    for (size_t part = 0; part < 64; part += 8) {
        __m256 s[8];
        for (int i = 0; i < 8; i++)
            s[i] = _mm256_loadu_ps(out + 8 * (part + i));
        for (size_t m = 0; m < masks; m++) {
            if (coefficients[m] == 0)
                continue;
            __m256 a = _mm256_set1_ps(coefficients[m]);
            for (int i = 0; i < 8; i++)
                s[i] = _mm256_add_ps(s[i], _mm256_and_ps(lanes_of(rows[m * stride + part + i]), a));
        }
        for (int i = 0; i < 8; i++)
            _mm256_storeu_ps(out + 8 * (part + i), s[i]);
    }
}

__attribute__((target("avx2")))
static void select_avx2(const uint8_t *row, size_t bytes, const float *vector, float *out)
{
    for (size_t b = 0; b < bytes; b++)
        _mm256_storeu_ps(out + 8 * b, _mm256_and_ps(lanes_of(row[b]), _mm256_loadu_ps(vector + 8 * b)));
}

__attribute__((target("avx512f")))
static void select_avx512(const uint8_t *row, size_t bytes, const float *vector, float *out)
{
    size_t b = 0;
    for (; b + 2 <= bytes; b += 2) {
        uint16_t word;
        memcpy(&word, row + b, 2);
        _mm512_storeu_ps(out + 8 * b, _mm512_maskz_loadu_ps((__mmask16)word, vector + 8 * b));
    }
    select_portable(row + b, bytes - b, vector + 8 * b, out + 8 * b);
}

/* Sums of every subset of four weights, 16 for each half byte: a lane's half byte picks one by a permutation, so that 4
 * bits of 16 masks cost a shift, a permutation and an addition. Rows lie on pages of their own: the next ones are asked for
 * ahead of time, and a tile is as long as its tables fit the caches, so that each page is looked up seldom. */
#define TABLE_BYTES 256

__attribute__((target("avx512f")))
static void tables_of(const float *vector, size_t bytes, __m512 *tables)
{
    for (size_t half = 0; half < 2 * bytes; half++) {
        const float *v = vector + 4 * half;
        __m512 table = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(v[0]));
        table = _mm512_mask_add_ps(table, 0xcccc, table, _mm512_set1_ps(v[1]));
        table = _mm512_mask_add_ps(table, 0xf0f0, table, _mm512_set1_ps(v[2]));
        tables[half] = _mm512_mask_add_ps(table, 0xff00, table, _mm512_set1_ps(v[3]));
    }
}

/* 64 bytes of 16 rows to 16 vectors; vector i has the four bytes from 4 i on of each row, one lane per row. If there
 * are fewer rows, the last one is repeated. */
__attribute__((target("avx512f")))
static inline void transpose(const uint8_t *rows, size_t stride, size_t masks, __m512i *out)
{
    __m512i a[16], b[16];
    for (size_t i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(rows + (i < masks ? i : masks - 1) * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4 q + r], lane group g: column 4 g + r of rows 4 q to 4 q + 3. */
    for (int r = 0; r < 4; r++) {
        __m512i low = _mm512_shuffle_i32x4(a[r], a[4 + r], 0x88), high = _mm512_shuffle_i32x4(a[8 + r], a[12 + r], 0x88);
        out[r] = _mm512_shuffle_i32x4(low, high, 0x88);
        out[8 + r] = _mm512_shuffle_i32x4(low, high, 0xdd);
        low = _mm512_shuffle_i32x4(a[r], a[4 + r], 0xdd), high = _mm512_shuffle_i32x4(a[8 + r], a[12 + r], 0xdd);
        out[4 + r] = _mm512_shuffle_i32x4(low, high, 0x88);
        out[12 + r] = _mm512_shuffle_i32x4(low, high, 0xdd);
    }
}

__attribute__((target("avx512f")))
static void dot_tile_avx512(const uint8_t *rows, size_t stride, size_t masks, size_t bytes, const float *vector, double *sums)
{
    __m512 tables[2 * TABLE_BYTES];
    for (size_t first = 0; first + 64 <= bytes; first += TABLE_BYTES) {
        size_t some = bytes - first < TABLE_BYTES ? (bytes - first) / 64 * 64 : TABLE_BYTES;
        tables_of(vector + 8 * first, some, tables);
        for (size_t m = 0; m < masks; m += 16) {
            size_t group = masks - m < 16 ? masks - m : 16;
            __m512 s[4];
            for (int i = 0; i < 4; i++)
                s[i] = _mm512_setzero_ps();
            for (size_t b = 0; b < some; b += 64) {
                __m512i words[16];
                for (int i = 16; i < 32; i++)
                    __builtin_prefetch(rows + (m + i) * stride + first + b);
                transpose(rows + m * stride + first + b, stride, group, words);
                const __m512 *table = tables + 2 * b;
                for (int i = 0; i < 16; i++)
                    for (int half = 0; half < 8; half++) {
                        __m512i picked = _mm512_srli_epi32(words[i], 4 * half); /* the low four bits count */
                        s[half % 4] = _mm512_add_ps(s[half % 4], _mm512_permutexvar_ps(picked, table[8 * i + half]));
                    }
            }
            __m512 sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
            __m256 low = _mm512_castps512_ps256(sum), high = _mm512_castps512_ps256(_mm512_shuffle_f32x4(sum, sum, 0xee));
            __mmask16 lanes = (__mmask16)((1u << group) - 1);
            __m512d before = _mm512_maskz_loadu_pd((__mmask8)lanes, sums + m);
            _mm512_mask_storeu_pd(sums + m, (__mmask8)lanes, _mm512_add_pd(before, _mm512_cvtps_pd(low)));
            before = _mm512_maskz_loadu_pd((__mmask8)(lanes >> 8), sums + m + 8);
            _mm512_mask_storeu_pd(sums + m + 8, (__mmask8)(lanes >> 8), _mm512_add_pd(before, _mm512_cvtps_pd(high)));
        }
    }
    size_t whole = bytes / 64 * 64;
    if (whole < bytes)
        dot_tile_avx2(rows + whole, stride, masks, bytes - whole, vector + 8 * whole, sums);
}

__attribute__((target("avx512f")))
static void sum_tile_avx512(const uint8_t *rows, size_t stride, size_t masks, const float *coefficients, float *out)
{
    for (size_t part = 0; part < 64; part += 32) {
        __m512 s[16];
        for (int i = 0; i < 16; i++)
            s[i] = _mm512_loadu_ps(out + 8 * part + 16 * i);
        for (size_t m = 0; m < masks; m++) {
            if (coefficients[m] == 0)
                continue;
            __m512 a = _mm512_set1_ps(coefficients[m]);
            uint16_t word[16];
            memcpy(word, rows + m * stride + part, 32);
            for (int i = 0; i < 16; i++)
                s[i] = _mm512_mask_add_ps(s[i], (__mmask16)word[i], s[i], a);
        }
        for (int i = 0; i < 16; i++)
            _mm512_storeu_ps(out + 8 * part + 16 * i, s[i]);
    }
}
#endif

/* 0 portable, 1 AVX2, 2 AVX-512. */
int packed_best_level(void)
{
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return 2;
    if (__builtin_cpu_supports("avx2"))
        return 1;
#endif
    return 0;
}

static dot_tile dot_of(int level)
{
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (level == 2)
        return dot_tile_avx512;
    if (level == 1)
        return dot_tile_avx2;
#endif
    return dot_tile_portable;
}

static sum_tile sum_of(int level)
{
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (level == 2)
        return sum_tile_avx512;
    if (level == 1)
        return sum_tile_avx2;
#endif
    return sum_tile_portable;
}

static select_row select_of(int level)
{
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    if (level == 2)
        return select_avx512;
    if (level == 1)
        return select_avx2;
#endif
    return select_portable;
}

/* Of `bytes` bytes of each of `masks` rows, which lie `stride` bytes apart, with 8 * bytes floats; `out` is dense. */
void packed_select(int level, const uint8_t *packed, size_t stride, size_t masks, size_t bytes, const float *vector, float *out)
{
    select_row select = select_of(level);
    for (size_t m = 0; m < masks; m++)
        select(packed + m * stride, bytes, vector, out + 8 * m * bytes);
}

/* Of `masks` rows of `bytes` bytes each, with a vector of 8 * bytes floats; `sums` holds `masks` doubles, set here. */
void packed_dot(int level, const uint8_t *packed, size_t masks, size_t bytes, const float *vector, double *sums)
{
    dot_tile tile = dot_of(level);
    memset(sums, 0, masks * sizeof(double));
    for (size_t b = 0; b < bytes; b += TILE / 8) {
        size_t some = bytes - b < TILE / 8 ? bytes - b : TILE / 8;
        tile(packed + b, bytes, masks, some, vector + 8 * b, sums);
    }
}

/* Of bytes first to last (exclusive) of each of `masks` rows; out[8 * first] to out[8 * last - 1] are set here. */
void packed_weighted_sum(int level, const uint8_t *packed, size_t masks, size_t bytes, size_t first, size_t last,
                         const float *coefficients, float *out)
{
    sum_tile tile = sum_of(level);
    memset(out + 8 * first, 0, 8 * (last - first) * sizeof(float));
    size_t whole = first + (last - first) / 64 * 64;
    /* Some rows at a time, and of these a stretch, so that their pages are looked up once for several tiles. */
    for (size_t b = first; b < whole; b += STRETCH)
        for (size_t m = 0; m < masks; m += ROWS) {
            size_t rows = masks - m < ROWS ? masks - m : ROWS;
            for (size_t c = b; c < whole && c < b + STRETCH; c += 64)
                tile(packed + m * bytes + c, bytes, rows, coefficients + m, out + 8 * c);
        }
    for (size_t m = 0; m < masks; m++)
        for (size_t c = whole; c < last && coefficients[m] != 0; c++)
            for (int j = 0; j < 8; j++)
                out[8 * c + j] += (packed[m * bytes + c] >> j) & 1 ? coefficients[m] : 0.0f;
}
