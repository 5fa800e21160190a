"""The functions of the C source that read no weights. Words in capitals are replaced, see `kernels.typed`."""

from __future__ import annotations

MAX_POOL = """\
static void max_pool(const struct windows *w, int32_t channels, const VALUE *input, VALUE *output)
{
    int32_t y, x, i, j;
    for (; channels > 0; channels--, input += w->height * w->width)
        for (y = 0; y < w->out_height; y++)
            for (x = 0; x < w->out_width; x++) {
                VALUE most = LOWEST;
                for (i = 0; i < w->kernel_height; i++)
                    for (j = 0; j < w->kernel_width; j++) {
                        int32_t row = y * w->stride_y + i * w->dilation_y - w->above;
                        int32_t column = x * w->stride_x + j * w->dilation_x - w->left;
                        if (row >= 0 && row < w->height && column >= 0 && column < w->width &&
                            input[row * w->width + column] > most)
                            most = input[row * w->width + column];
                    }
                *output++ = most;
            }
}
"""

MEAN_POOL = """\
static void mean_pool(const struct windows *w, int32_t channels, const VALUE *input, VALUE *output)
{
    int32_t y, x, i, j;
    for (; channels > 0; channels--, input += w->height * w->width)
        for (y = 0; y < w->out_height; y++)
            for (x = 0; x < w->out_width; x++) {
                SUM sum = 0;
                int32_t count = 0;
                for (i = 0; i < w->kernel_height; i++)
                    for (j = 0; j < w->kernel_width; j++) {
                        int32_t row = y * w->stride_y + i - w->above, column = x * w->stride_x + j - w->left;
                        if (row >= 0 && row < w->height && column >= 0 && column < w->width) {
                            sum += input[row * w->width + column];
                            count++;
                        }
                    }
                *output++ = MEAN;
            }
}
"""
ADD = {
    "int8": """\
struct add {
    int32_t size;
    int32_t first_zero, first_multiplier, first_shift;
    int32_t second_zero, second_multiplier, second_shift;
    int32_t out_zero, out_multiplier, out_shift;
    int32_t least, most;
};

static void add(const struct add *a, const int8_t *first, const int8_t *second, int8_t *output)
{
    int32_t i;
    for (i = 0; i < a->size; i++) {
        int32_t x = rescaled((first[i] - a->first_zero) * (1 << 20), a->first_multiplier, a->first_shift);
        int32_t y = rescaled((second[i] - a->second_zero) * (1 << 20), a->second_multiplier, a->second_shift);
        int32_t sum = rescaled(x + y, a->out_multiplier, a->out_shift) + a->out_zero;
        output[i] = (int8_t)clamp(sum, a->least, a->most);
    }
}
""",
    "float32": """\
struct add {
    int32_t size;
    float least, most;
};

static void add(const struct add *a, const float *first, const float *second, float *output)
{
    int32_t i;
    for (i = 0; i < a->size; i++)
        output[i] = clamp(first[i] + second[i], a->least, a->most);
}
""",
}

PAD = """\
static void pad(const struct windows *w, int32_t channels, VALUE zero, const VALUE *input, VALUE *output)
{
    int32_t y, x;
    for (; channels > 0; channels--, input += w->height * w->width)
        for (y = -w->above; y < w->out_height - w->above; y++)
            for (x = -w->left; x < w->out_width - w->left; x++)
                *output++ = y >= 0 && y < w->height && x >= 0 && x < w->width ? input[y * w->width + x] : zero;
}
"""

ACTIVATE = """\
static void activate(int32_t size, SUM least, SUM most, const VALUE *input, VALUE *output)
{
    int32_t i;
    for (i = 0; i < size; i++)
        output[i] = (VALUE)clamp(input[i], least, most);
}
"""

COPY = """\
static void copy(int32_t size, const VALUE *input, VALUE *output)
{
    int32_t i;
    for (i = 0; i < size; i++)
        output[i] = input[i];
}
"""
