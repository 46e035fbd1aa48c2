/* y[steps][width]; gates in the order reset, update, new; scratch: 7 * width */
static void gru(const float *x, float *y, int steps, int inputs, int width, const weight *w_x, const float *scale_x, const float *b_x,
                const weight *w_h, const float *scale_h, const float *b_h, float *scratch)
{
    float *hidden = scratch, *from_x = hidden + width, *from_h = from_x + 3 * width;
    for (int i = 0; i < width; i++)
        hidden[i] = 0.0f;
    for (int step = 0; step < steps; step++, x += inputs, y += width) {
        affine(x, from_x, 1, inputs, 3 * width, w_x, scale_x, b_x);
        affine(hidden, from_h, 1, width, 3 * width, w_h, scale_h, b_h);
        for (int i = 0; i < width; i++) {
            const float reset = sigmoid(from_x[i] + from_h[i]), update = sigmoid(from_x[width + i] + from_h[width + i]);
            const float new = tanhf(from_x[2 * width + i] + reset * from_h[2 * width + i]);
            y[i] = hidden[i] = (1.0f - update) * new + update * hidden[i];
        }
    }
}
