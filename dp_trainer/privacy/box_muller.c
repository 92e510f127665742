/* Gaussian noise on the CPU in one pass: what `_Keystream` does in ten, for one thread.
 *
 * The bits come from the caller, from a cipher; no randomness is made here. The same bits give the
 * same values as the PyTorch operations in `noise.py`, to float32 rounding; a test compares them.
 * Optional: where no compiler was at hand at installation, those operations are used.
 *
 * A pair takes two words. With u = (1 + the low 31 bits of the first) / 2^31 and t the second as a signed
 * fraction of the circle, the pair is sqrt(-2 ln u) (cos t, sin t): Box and Muller (1958). Polynomials
 * are minimax fits on the reduced ranges given below; their errors are below float32's own rounding.
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline __attribute__((always_inline)) float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline __attribute__((always_inline)) uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* ln u for u in [2^-31, 1]: u = 2^e (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1]. */
static inline __attribute__((always_inline)) float logarithm(float u)
{
    int32_t e = (int32_t)(as_bits(u) - 0x3f3504f3u) >> 23;
    float f = as_float(as_bits(u) - ((uint32_t)e << 23)) - 1.0f;
    float p = 6.915428e-2f;
    p = p * f - 1.1789837e-1f;
    p = p * f + 1.1872964e-1f;
    p = p * f - 1.2384343e-1f;
    p = p * f + 1.4218659e-1f;
    p = p * f - 1.6669251e-1f;
    p = p * f + 2.0002227e-1f;
    p = p * f - 2.4999987e-1f;
    p = p * f + 3.3333310e-1f;
    return (float)e * 6.9314718e-1f + (f + f * f * (f * p - 0.5f));
}

/* Adds the pairs to `first` and `second`, then divides. Entries of one pair stand at one index. */
static inline __attribute__((always_inline)) void add_pairs(
    float *restrict first, float *restrict second, const uint32_t *restrict radii,
    const uint32_t *restrict angles, Py_ssize_t pairs, float std, float divisor)
{
    for (Py_ssize_t i = 0; i < pairs; i++) {
        float u = ((float)(int32_t)(radii[i] & 0x7fffffffu) + 1.0f) * 0x1p-31f;
        float radius = std * sqrtf(-2.0f * logarithm(u));
        /* The nearest quarter turn, and what is left of the angle: x in [-pi/4, pi/4]. */
        uint32_t quarter = (angles[i] + 0x20000000u) >> 30;
        float x = (float)(int32_t)(angles[i] - (quarter << 30)) * 1.4629180793e-9f;
        float s = x * x;
        float sine = x + x * s * (-1.6666655e-1f + s * (8.33218e-3f + s * -1.9517e-4f));
        float cosine = 1.0f - 0.5f * s + s * s * (4.16666469e-2f + s * (-1.38873675e-3f + s * 2.44384515e-5f));
        /* Turn back: an odd quarter swaps them, and the half plane decides each sign. */
        uint32_t odd = 0u - (quarter & 1u);
        uint32_t a = (as_bits(cosine) & ~odd) | (as_bits(sine) & odd);
        uint32_t b = (as_bits(sine) & ~odd) | (as_bits(cosine) & odd);
        a ^= ((quarter + 1u) & 2u) << 30;
        b ^= (quarter & 2u) << 30;
        first[i] = (first[i] + as_float(a) * radius) / divisor;
        second[i] = (second[i] + as_float(b) * radius) / divisor;
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) static void add_pairs_avx2(
    float *first, float *second, const uint32_t *radii, const uint32_t *angles, Py_ssize_t pairs, float std,
    float divisor)
{
    add_pairs(first, second, radii, angles, pairs, std, divisor);
}
#endif

static PyObject *add(PyObject *self, PyObject *arguments)
{
    unsigned long long values_at, bits_at;
    Py_ssize_t count;
    float std, divisor;
    if (!PyArg_ParseTuple(arguments, "KKnff", &values_at, &bits_at, &count, &std, &divisor))
        return NULL;
    if (!values_at || !bits_at || count < 0) {
        PyErr_SetString(PyExc_ValueError, "add: no memory, or a negative count");
        return NULL;
    }
    Py_ssize_t half = count - count / 2, pairs = count / 2;
    float *values = (float *)(uintptr_t)values_at;
    const uint32_t *bits = (const uint32_t *)(uintptr_t)bits_at;
    float unused = 0.0f;
    Py_BEGIN_ALLOW_THREADS
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        add_pairs_avx2(values, values + half, bits, bits + half, pairs, std, divisor);
    else
#endif
        add_pairs(values, values + half, bits, bits + half, pairs, std, divisor);
    /* The middle one of an odd count: its partner is thrown away. */
    if (half > pairs)
        add_pairs(values + pairs, &unused, bits + pairs, bits + half + pairs, 1, std, divisor);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"add", add, METH_VARARGS,
     "add(values_address, bits_address, count, std, divisor): adds noise to `count` float32 values from\n"
     "`count` 32-bit words, one more where the count is odd, then divides."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_box_muller", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__box_muller(void) { return PyModule_Create(&module); }
