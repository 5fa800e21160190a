"""The functions of the C source that read weights, and what all functions share.

VALUE, SUM and the like are replaced for integers or floating point.
A function is written only if the network needs it. Images are stored channel by channel, as in PyTorch.
"""

from __future__ import annotations

from typing import Literal

from lightning_roulette.slim.export.c.packing import Form

Values = Literal["int8", "float32"]

_TYPES = {
    "int8": {"VALUE": "int8_t", "SUM": "int32_t"},
    "float32": {"VALUE": "float", "SUM": "float"},
}

WINDOWS = """\
/* Windows over one channel of an image, and what lies around it. */
struct windows {
    int32_t height, width;         /* of the image */
    int32_t out_height, out_width; /* number of windows */
    int32_t kernel_height, kernel_width;
    int32_t stride_y, stride_x;
    int32_t dilation_y, dilation_x;
    int32_t above, left; /* rows and columns of padding */
};
"""

LAYER = {
    "int8": """\
/* The weights of a layer, and how its sums become integers of 8 bits. */
struct layer {
    const int8_t *values;
    const uint8_t *positions;
    const int32_t *bias;
    const int32_t *multipliers;
    const int8_t *shifts;
    int32_t rows, columns;
    int32_t count_bits, gap_bits;
    int32_t in_zero, out_zero, least, most;
};
""",
    "float32": """\
/* The weights of a layer. */
struct layer {
    const float *values;
    const uint8_t *positions;
    const float *bias;
    int32_t rows, columns;
    int32_t count_bits, gap_bits;
    float least, most;
};
""",
}

CONV = """\
struct conv {
    struct layer layer;
    struct windows windows;
    int32_t rows_per_group, channels_per_group;
};
"""

BIT = """\
struct bits {
    const uint8_t *bytes;
    uint32_t at;
};

static uint32_t bit(struct bits *bits)
{
    uint32_t at = bits->at++;
    return (uint32_t)(bits->bytes[at >> 3] >> (7 - (at & 7))) & 1u;
}
"""

RICE = """\
/* A number in a Rice code: its high part in ones, a zero, and its low bits. */
static int32_t rice(struct bits *bits, int32_t low)
{
    uint32_t number = 0;
    while (bit(bits))
        number++;
    for (; low > 0; low--)
        number = number << 1 | bit(bits);
    return (int32_t)number;
}
"""

CLAMP = """\
static SUM clamp(SUM x, SUM least, SUM most)
{
    return x < least ? least : x > most ? most : x;
}
"""

RESCALED = """\
/* x * multiplier * 2^(shift - 31), rounded at the 31st bit and again after the shift, as TensorFlow Lite does. */
static int32_t rescaled(int32_t x, int32_t multiplier, int32_t shift)
{
    int32_t up = shift > 0 ? shift : 0, down = shift > 0 ? 0 : -shift;
    int64_t product = (int64_t)(x * ((int32_t)1 << up)) * multiplier;
    int32_t high = (int32_t)((product + (product >= 0 ? 1 << 30 : 1 - (1 << 30))) / ((int64_t)1 << 31));
    uint32_t mask = ((uint32_t)1 << down) - 1;
    uint32_t threshold = (mask >> 1) + (high < 0 ? 1u : 0u);
    return (high >> down) + (((uint32_t)high & mask) > threshold ? 1 : 0);
}
"""

_FINISHED = {
    "int8": """\
static int8_t finished(const struct layer *layer, int32_t row, int32_t sum)
{
    int32_t x = rescaled(sum, layer->multipliers[row], layer->shifts[row]) + layer->out_zero;
    return (int8_t)clamp(x, layer->least, layer->most);
}
""",
    "float32": """\
static float finished(const struct layer *layer, int32_t row, float sum)
{
    (void)row;
    return clamp(sum, layer->least, layer->most);
}
""",
}

# the weights of one row that are stored, in each form; TERM is done with each
_ROW: dict[Form, str] = {
    "dense": """\
        for (column = 0; column < layer->columns; column++)
            TERM
""",
    "constant": """\
        for (column = 0; column < layer->columns; column++)
            TERM
""",
    "bitmap": """\
        for (column = 0; column < layer->columns; column++)
            if (bit(&positions))
                TERM
""",
    "gaps": """\
        int32_t left = rice(&positions, layer->count_bits);
        for (column = 0; left > 0; left--) {
            column += rice(&positions, layer->gap_bits);
            TERM
            column++;
        }
""",
}
_OPENED = "    struct bits positions = {layer->positions, 0};\n"

_LINEAR = """\
static void linear_FORM(const struct layer *layer, const VALUE *input, VALUE *output)
{
    const VALUE *value = layer->values;
OPENED    int32_t row, column;
    for (row = 0; row < layer->rows; row++) {
        SUM sum = layer->bias[row];
ROW        output[row] = finished(layer, row, sum);
    }
}
"""
_LINEAR_TERM = {
    "int8": "sum += *value++ * (input[column] - layer->in_zero);",
    "float32": "sum += *value++ * input[column];",
}

SPREAD = """\
/* Add one weight times its inputs to the sums of all windows. Padding is skipped, as it stands for zero. */
static void spread(const struct conv *conv, SUM weight, int32_t column, const VALUE *image, SUM *sums)
{
    const struct windows *w = &conv->windows;
    int32_t area = w->kernel_height * w->kernel_width, place = column % area, y, x;
    int32_t dy = place / w->kernel_width * w->dilation_y - w->above;
    int32_t dx = place % w->kernel_width * w->dilation_x - w->left;
    int32_t first = dx < 0 ? (w->stride_x - 1 - dx) / w->stride_x : 0;
    image += column / area * w->height * w->width;
    for (y = 0; y < w->out_height; y++) {
        int32_t row = y * w->stride_y + dy;
        SUM *line = sums + y * w->out_width;
        const VALUE *pixels;
        if (row < 0 || row >= w->height)
            continue;
        pixels = image + row * w->width;
        for (x = first; x < w->out_width && x * w->stride_x + dx < w->width; x++)
            line[x] += weight * INPUT;
    }
}
"""
_INPUT = {
    "int8": "(pixels[x * w->stride_x + dx] - conv->layer.in_zero)",
    "float32": "pixels[x * w->stride_x + dx]",
}

_CONV = """\
static void conv_FORM(const struct conv *conv, const VALUE *input, VALUE *output)
{
    const struct layer *layer = &conv->layer;
    const struct windows *w = &conv->windows;
    const VALUE *value = layer->values;
    int32_t size = w->out_height * w->out_width, group = conv->channels_per_group * w->height * w->width;
OPENED    int32_t row, column, i;
    for (row = 0; row < layer->rows; row++, output += size) {
        const VALUE *image = input + row / conv->rows_per_group * group;
SUMS        for (i = 0; i < size; i++)
            sums[i] = layer->bias[row];
ROW        for (i = 0; i < size; i++)
            output[i] = finished(layer, row, sums[i]);
    }
}
"""
_CONV_TERM = "spread(conv, *value++, column, image, sums);"

_MEAN = {
    "int8": "(int8_t)((sum > 0 ? sum + count / 2 : sum - count / 2) / count)",
    "float32": "sum / (float)count",
}


def linear(form: Form, values: Values) -> str:
    """Return the function of a linear layer whose weights have this form."""
    return typed(_formed(_LINEAR, form, _LINEAR_TERM[values]), values)


def conv(form: Form, values: Values) -> str:
    """Return the function of a convolution whose weights have this form."""
    sums = "        float *sums = output;\n" if values == "float32" else ""
    return typed(_formed(_CONV, form, _CONV_TERM).replace("SUMS", sums), values)


def typed(text: str, values: Values) -> str:
    """Return a function for a type of values."""
    text = text.replace("INPUT", _INPUT[values]).replace("MEAN", _MEAN[values])
    text = text.replace("LOWEST", "INT8_MIN" if values == "int8" else "-FLT_MAX")
    for word, kind in _TYPES[values].items():
        text = text.replace(word, kind)
    return text


def finished(values: Values) -> str:
    """Return the function that makes an output of a sum."""
    return _FINISHED[values]


def _formed(text: str, form: Form, term: str) -> str:
    opened = _OPENED if form in ("bitmap", "gaps") else ""
    row = _ROW[form].replace("TERM", term.replace("*value++", "*value") if form == "constant" else term)
    return text.replace("FORM", form).replace("OPENED", opened).replace("ROW", row)
