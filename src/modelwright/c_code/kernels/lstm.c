/* y[steps][width]; gates in the order input, forget, cell, output; scratch: 10 * width */
static void lstm(const float *x, float *y, int steps, int inputs, int width, const weight *w_x, const float *scale_x, const float *b_x,
                 const weight *w_h, const float *scale_h, const float *b_h, float *scratch)
{
    float *hidden = scratch, *cell = hidden + width, *from_x = cell + width, *from_h = from_x + 4 * width;
    for (int i = 0; i < 2 * width; i++)
        scratch[i] = 0.0f;
    for (int step = 0; step < steps; step++, x += inputs, y += width) {
        affine(x, from_x, 1, inputs, 4 * width, w_x, scale_x, b_x);
        affine(hidden, from_h, 1, width, 4 * width, w_h, scale_h, b_h);
        for (int i = 0; i < width; i++) {
            const float in = sigmoid(from_x[i] + from_h[i]), forget = sigmoid(from_x[width + i] + from_h[width + i]);
            const float new = tanhf(from_x[2 * width + i] + from_h[2 * width + i]);
            cell[i] = forget * cell[i] + in * new;
            y[i] = hidden[i] = sigmoid(from_x[3 * width + i] + from_h[3 * width + i]) * tanhf(cell[i]);
        }
    }
}
